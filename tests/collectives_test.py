"""What is read from the text of compiled programs, against programs whose collectives are known."""

import jax
import jax.numpy as jnp
import pytest

from qalora_jax import collectives
from qalora_jax import sharding
from qalora_jax import topologies

P = jax.sharding.PartitionSpec

# As libtpu and the compilers for GPUs print them: pairs, tuples, layouts with parentheses, a collective shared by
# fusions, loops within loops, a branch.
TEXT = """\
HloModule jit_f, is_scheduled=true, entry_computation_layout={(f32[4]{0})->f32[4]{0}}

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}

%start (p: bf16[32,32]) -> (bf16[32,32], bf16[64,32]) {
  %p = bf16[32,32]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.1 = bf16[64,32]{1,0:T(8,128)(2,1)S(1)} all-gather(%p), backend_config={"async_collective_fusion_config":{}}
  ROOT %c = (bf16[32,32], bf16[64,32]) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%beside (p: bf16[32,32]) -> bf16[64,32] {
  %p = bf16[32,32]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.10 = bf16[64,32]{1,0} all-gather(%p), backend_config={"async_collective_fusion_config":{}}
}

%wrapped (p: f32[8]) -> f32[2] {
  ROOT %reduce-scatter = f32[2]{0} reduce-scatter(%p), channel_id=4, to_apply=%add
}

%inner_condition (p: (s32[], f32[4])) -> pred[] {
  %constant.3 = s32[]{:T(128)} constant(3), metadata={}
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %constant.3), direction=LT, metadata={}
}

%inner (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %all-reduce.2 = (f32[4]{0:T(128)S(1)}, /*index=1*/u32[2,3]{1,0}) all-reduce(%a, %b), channel_id=1, to_apply=%add
  ROOT %t = (s32[], f32[4]) tuple(%i, %x)
}

%outer_condition (p: (s32[], f32[4])) -> pred[] {
  ROOT %fused = pred[] fusion(%i, %n), kind=kLoop, calls=%compared
}

%compared (i: s32[], n: s32[]) -> pred[] {
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%outer (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  ROOT %while.1 = (s32[], f32[4]{0}) while(%p), condition=%inner_condition, body=%inner
}

%then (p: f32[4]) -> f32[4] {
  ROOT %all-to-all.1 = s4[5,3]{1,0} all-to-all(%p), channel_id=9
}

%else (p: f32[4]) -> f32[4] {
  ROOT %copied = f32[4]{0} copy(%p)
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0), sharding={devices=[8]<=[8]}
  %ag-start = (f32[4]{0}, f32[32]{0}) all-gather-start(%x), channel_id=2, dimensions={0}
  %ag-done = f32[32]{0} all-gather-done(%ag-start)
  %cp-start = (f32[4]{0}, f32[4]{0}, u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1}}
  %cp-done = f32[4]{0} collective-permute-done(%cp-start)
  %rs-start = ((f32[8]{0}), f32[2]{0}) async-start(%x), calls=%wrapped
  %rs-done = f32[2]{0} async-done(%rs-start), calls=%wrapped
  %shared = (bf16[32,32], bf16[64,32]) fusion(%x), kind=kCustom, calls=%start
  %more = bf16[64,32] fusion(%x), kind=kCustom, calls=%beside
  %if = f32[4]{0} conditional(%i, %x, %x), branch_computations={%then, %else}
  ROOT %while.2 = (s32[], f32[4]) while(%t), condition=%outer_condition, body=%outer, backend_config={"known_trip_count":{"n":"5"}}
}
"""  # noqa: E501 - XLA's lines


def test_every_way_to_say_it_is_read():
  assert collectives.of(TEXT) == [
    collectives.Collective('all-gather', 'f32', (32,), 128, 1),
    collectives.Collective('collective-permute', 'f32', (4,), 16, 1),
    collectives.Collective('reduce-scatter', 'f32', (2,), 8, 1),
    collectives.Collective('all-gather', 'bf16', (64, 32), 4096, 1),
    collectives.Collective('all-to-all', 's4', (5, 3), 8, 1),
    collectives.Collective('all-reduce', 'f32', (4,), 16, 15),
    collectives.Collective('all-reduce', 'u32', (2, 3), 24, 15),
  ]


def test_a_text_that_is_no_program_is_refused():
  with pytest.raises(ValueError, match='no ENTRY computation'):
    collectives.of('module @jit_f {}')


def test_a_program_without_devices_to_talk_to_has_none():
  assert collectives.of(jax.jit(jnp.sin).lower(1.0).compile().as_text()) == []


def looped(mesh):
  """A sum over inputs in each of seven steps within each of two, and one gathering after them."""

  def step(x, _):
    return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w_of(x)), None), x, length=7)[0], None

  def w_of(x):
    return jax.lax.with_sharding_constraint(jnp.sin(jnp.outer(x[0], x[1])), at('tensor', None))

  def at(*axes):
    return jax.sharding.NamedSharding(mesh, P(*axes))

  def run(x):
    return jax.lax.with_sharding_constraint(jax.lax.scan(step, x, length=2)[0], at())

  return run, dict(in_shardings=at(None, 'tensor'), out_shardings=at())


@pytest.mark.parametrize('target', ['cpu', 'tpu'])
def test_loops_multiply(target):
  if target == 'tpu' and not topologies.installed():
    pytest.skip("libtpu is not installed (pip install 'qalora_jax[aot-tpu]', Linux on x86-64)")
  devices = None if target == 'cpu' else list(topologies.mesh('v5e:2x2', all=4).devices)
  mesh = sharding.make_mesh(data=1, tensor=4, devices=devices or jax.devices()[:4])
  run, shardings = looped(mesh)
  x = jax.ShapeDtypeStruct((16, 64), jnp.float32)
  with jax.set_mesh(mesh):
    compile_ = topologies.compiled if target == 'tpu' else lambda f, *x, **o: jax.jit(f, **o).lower(*x).compile()
    found = collectives.of(compile_(run, x, **shardings).as_text())
  # The product itself; what w takes is the compiler's business.
  sums = [each for each in found if each.dtype == 'f32' and each.shape in [(16, 64), (16, 16), (4, 64)]]
  inside = [each for each in sums if each.times == 14]
  assert {each.kind for each in inside} <= {'all-reduce', 'reduce-scatter', 'all-gather'} and inside, found
  assert {each.times for each in found} <= {1, 2, 14}

"""Sharded is unsharded; what does not divide is named; and what travels between devices is packed."""

import dataclasses
import functools
import math

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import step_test

from qalora_jax import adapters
from qalora_jax import collectives
from qalora_jax import sharding
from qalora_jax import step as step_lib
from qalora_jax import topologies
from qalora_jax.kernels import mesh as mesh_lib
from qalora_jax.kernels import plan
from qalora_jax.models import decoder
from qalora_jax.models import linear
from qalora_jax.quant import affine
from qalora_jax.quant import float4
from qalora_jax.quant import method
from qalora_jax.quant import qtensor

pytestmark = pytest.mark.skipif(
  len(jax.devices()) < 8, reason='needs eight devices; tests/conftest.py asks for them on CPU'
)

MESHES = ((8, 1, 1), (1, 8, 1), (1, 1, 8), (1, 4, 2), (2, 2, 2))
D, F, GROUP, ROWS, T = 64, 128, 8, 8, 6
DOUBLED = float4.Float4(group=GROUP, double=True)


def of_a_file(w, name):
  """As GPTQ's files are read: scales in float16, offsets in float32."""
  q = affine.Affine(4, GROUP, zero='integer', scale_dtype='float16')(w, name)
  return q.replace(offset=q.offset.astype(jnp.float32))


FROZEN = {
  **{f'{bits} bits': affine.Affine(bits, GROUP) for bits in qtensor.PLANES},
  **{f'{bits} bits, symmetric': affine.Affine(bits, GROUP, symmetric=True) for bits in qtensor.PLANES},
  'integer zero': affine.Affine(4, GROUP, zero='integer'),
  'float16 constants': affine.Affine(4, GROUP, scale_dtype='float16'),
  "GPTQ's files": of_a_file,
  'nf4': float4.Float4(group=GROUP),
  'fp4': float4.Float4(kind='fp4', group=GROUP),
  'nf4, double': DOUBLED,
  'dense': None,
}
TRAINED = {
  'trained': None,
  'trained, rounded': method.QAT(affine.Affine(4, GROUP), learned=False),
  'trained, rounded, scales too': method.QAT(affine.Affine(3, GROUP), learned=True),
}
ADAPTERS = {
  'none': None,
  'qalora, sum': adapters.Adapter('qalora', 4, 8.0),
  'qalora, mean': adapters.Adapter('qalora', 4, 8.0, pool='mean'),
  'lora': adapters.Adapter('lora', 4, 8.0),
}


# One matrix divided by columns, one by rows, as in a block.
WAYS = {'columns': (F, ('embed', 'mlp')), 'rows': (D, ('mlp', 'embed'))}


def matrix(base: str, kind: str, way: str) -> linear.Linear:
  """`base` under an adapter."""
  choices = dict(quantizers=(('.', (FROZEN | TRAINED)[base]),), adapted='.')
  return linear.Linear(*WAYS[way], linear.Scheme(trains=base in TRAINED, adapter=ADAPTERS[kind], **choices), name='w')


def program(models, every: list[dict], xs: list):
  """Of every model: what it makes of its x, and the gradient of a loss of that in its params and in x."""

  def one(model, variables, x):
    def loss(params, x):
      y = model.apply({**variables, 'params': params}, x)
      return jnp.sum(jnp.sin(3 * y)), y

    gradients, y = jax.grad(loss, argnums=(0, 1), has_aux=True)(variables['params'], x)
    return y, *gradients

  return [one(*each) for each in zip(models, every, xs, strict=True)]


def check(models, meshes):
  """`program` on every mesh is that on one device."""
  keys = [jax.random.key(at) for at in range(len(models))]
  widths = {F: D, D: F}
  xs = [jax.random.normal(key, (ROWS, T, widths[model.features])) for key, model in zip(keys, models, strict=True)]
  init = lambda: [
    {'frozen': {}, 'params': {}, **model.init(*each)} for model, *each in zip(models, keys, xs, strict=True)
  ]
  # Adapters are born with B = 0, which would leave A without a gradient.
  move = lambda leaf: leaf + 0.05 * jax.random.normal(jax.random.key(leaf.size), leaf.shape)
  move_all = lambda every: [{**each, 'params': jax.tree.map(move, each['params'])} for each in every]
  born, run = jax.jit(lambda: move_all(nn.unbox(init())))(), functools.partial(program, models)
  wanted = jax.jit(run)(born, xs)
  for mesh in map(mesh_of, meshes):
    at, rows = sharding.place(jax.eval_shape(init), mesh), sharding.batch(mesh)
    out = [(rows, each['params'], rows) for each in at]
    step = jax.jit(sharding.over(mesh, run), in_shardings=(at, rows), out_shardings=out)
    step_test.assert_trees_close(step(jax.device_put(born, at), jax.device_put(xs, rows)), wanted)


def mesh_of(sizes, devices=None):
  return sharding.make_mesh(**dict(zip(sharding.AXES, sizes, strict=True)), devices=devices)


@pytest.mark.parametrize('base', FROZEN | TRAINED)
def test_every_base_under_every_adapter(base):
  """Values, gradients in what trains and gradients in x, by XLA's products; every second base is divided by rows."""
  way = list(WAYS)[list(FROZEN | TRAINED).index(base) % 2]
  kinds = [*ADAPTERS] if FROZEN.get(base) else ['none'] if base in TRAINED else ['none', 'lora']
  check([matrix(base, kind, way) for kind in kinds], [(2, 2, 2)])


def test_every_mesh():
  """Columns of codes with scales in 8 bits, rows of codes with offsets; pooled by means; and nothing beside them."""
  models = [matrix('nf4, double', 'qalora, mean', 'columns'), matrix('4 bits', 'none', 'rows')]
  check(models, MESHES[:-1])


# The whole model.  Rows are few and short, so that no activation is as large as a matrix, and layers many, so that a
# stack of dense ones would outweigh all else.  Every matrix has a shape of its own.
CONFIG = decoder.Config(80, D, F, 12, 8, 8, head_dim=24, remat='full')
QALORA = linear.Scheme(quantizers=(('all', affine.Affine(4, GROUP)),), adapter=ADAPTERS['qalora, sum'])
MIXED = dataclasses.replace(
  QALORA,
  quantizers=(('layers/11/.*down', affine.Affine(2, GROUP, True)), ('mlp', DOUBLED), ('all', affine.Affine(3, GROUP))),
)
QLORA = linear.Scheme(quantizers=(('all', DOUBLED),), adapter=ADAPTERS['lora'])
FULL = linear.Scheme(trains=True)


def built(config, scheme, mesh):
  """(model, boxed abstract variables, the step for `mesh` and its shardings)."""
  model, tx = decoder.Decoder(config, scheme), optax.sgd(1.0)
  abstract = {'frozen': {}, **jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))}
  state = jax.eval_shape(functools.partial(step_lib.init_state, tx), abstract['params'])
  at = sharding.place((state, abstract['frozen']), mesh, 'replicate')
  rows = sharding.batch(mesh)
  step = sharding.over(mesh, functools.partial(step_lib.train_step, model, tx, 0, 1))
  shardings = dict(in_shardings=(*at, rows), out_shardings=(at[0], sharding.replicated(mesh)))
  return model, nn.unbox((state, abstract['frozen'])), step, shardings


def drawn(abstract):
  """A tree at random: any codes, and small numbers; all is used as it is, nothing is quantized."""
  rng = np.random.default_rng(0)

  def leaf(path, a):
    if a.dtype in (np.uint32, np.uint8):
      return rng.integers(0, np.iinfo(a.dtype).max, a.shape, a.dtype, endpoint=True)
    middle = 1.0 if 'norm' in jax.tree_util.keystr(path) else 0.0
    return rng.normal(middle, 0.05, a.shape).astype(a.dtype)

  return jax.tree_util.tree_map_with_path(leaf, abstract)


@functools.cache
def born(config, scheme):
  """The state and the frozen weights of a model, a batch, and a step of one device."""
  mesh = mesh_of((1, 1, 1), jax.devices()[:1])
  _, (state, frozen), step, _ = built(config, scheme, mesh)
  params, frozen = drawn((state.params, frozen))
  state = step_lib.init_state(optax.sgd(1.0), params)
  batch = {name: leaf[:, :T] for name, leaf in step_test.a_batch(rows=ROWS).items()}
  return state, frozen, batch, jax.jit(step)(state, frozen, batch)


@pytest.mark.parametrize(
  'scheme, sizes, impl',
  [
    (QALORA, (2, 2, 2), None),
    (QALORA, (1, 8, 1), None),
    (MIXED, (2, 2, 2), 'tpu_interpreted'),
    (QLORA, (1, 1, 8), None),
    (FULL, (1, 4, 2), None),
  ],
)
def test_a_step_of_a_model(scheme, sizes, impl, monkeypatch):
  """It is that of one device; it sends nothing dense that is quantized; and it keeps no dense stack."""
  mesh = mesh_of(sizes)
  divisions, run = set(), mesh_lib.run
  monkeypatch.setattr(
    mesh_lib, 'run', lambda f, x, w, d, t: (divisions.add((d.inputs, d.outputs, t)), run(f, x, w, d, t))[1]
  )
  state, frozen, batch, (wanted, metrics) = born(CONFIG, scheme)
  _, _, step, shardings = built(CONFIG, scheme, mesh)
  with plan.using(impl):
    compiled = jax.jit(step, **shardings).lower(state, frozen, batch).compile()
  got = compiled(*jax.device_put((state, frozen, batch), shardings['in_shardings']))
  step_test.assert_trees_close((got[0].params, got[1]), (wanted.params, metrics))
  # Kernels work by columns and by rows, there and back; XLA's own products are not run in parts.
  ways = {(None, 'tensor'), ('tensor', None)}
  assert divisions == ({(*way, back) for way in ways for back in (False, True)} if impl else set())
  check_traffic(collectives.of(compiled.as_text()), frozen, mesh)
  if not impl and scheme.quantizers and mesh.shape['tensor'] <= 2:
    # In float32.  Of many devices' parts each is as small as the activations that a layer keeps here.
    dense = sum(4 * math.prod(q.shape) for q in quantized(frozen)) / mesh.shape['tensor']
    assert compiled.memory_analysis().temp_size_in_bytes < dense / 2


def quantized(tree) -> list[qtensor.QTensor]:
  is_quantized = lambda node: isinstance(node, qtensor.QTensor)
  return [node for node in jax.tree.leaves(tree, is_leaf=is_quantized) if is_quantized(node)]


def check_traffic(found: list[collectives.Collective], frozen, mesh) -> None:
  """What travels of quantized weights: under FSDP one layer's codes, scales and offsets; else nothing at all."""
  matrices, parts = quantized(frozen), mesh.shape['tensor']
  assert found
  if not matrices:
    return
  copied = [each for each in found if each.kind not in ('all-reduce', 'reduce-scatter')]
  packed = [each for each in copied if each.dtype in ('u32', 'u8')]
  codes = {
    leaf.size // leaf.shape[0] // parts
    for q in matrices
    for leaf in jax.tree.leaves(q)
    if leaf.dtype in (np.uint32, np.uint8)
  }
  smallest = min(math.prod(q.shape[1:]) for q in matrices) // parts
  assert {math.prod(each.shape) for each in packed} <= codes, packed
  assert bool(packed) == (mesh.shape['fsdp'] > 1)
  # Embedding and head are dense; under FSDP the head is gathered, by its columns.
  head = {(D, CONFIG.vocab_size // parts), (CONFIG.vocab_size // parts, D)}
  floats = [each for each in copied if each.dtype in ('f32', 'bf16', 'f16') and each.shape not in head]
  assert all(math.prod(each.shape) < smallest for each in floats), floats
  if mesh.shape['fsdp'] == 1:
    assert not [each for each in copied if each.kind == 'all-gather'], copied


def test_heads_that_do_not_divide_are_cut_apart():
  """Two heads of keys over four devices: their columns divide, and that is enough."""
  config = dataclasses.replace(CONFIG, num_hidden_layers=1, num_key_value_heads=2)
  model, tokens = decoder.Decoder(config, QALORA), step_test.a_batch(rows=ROWS)['tokens']
  boxed, mesh = jax.eval_shape(model.init, jax.random.key(0), tokens), mesh_of((1, 2, 4))
  variables, at = drawn(nn.unbox(boxed)), sharding.place(boxed, mesh)
  divided = jax.jit(sharding.over(mesh, model.apply), in_shardings=(at, sharding.batch(mesh)))
  got = divided(*jax.device_put((variables, tokens), (at, sharding.batch(mesh))))
  step_test.assert_trees_close(got, jax.jit(model.apply)(variables, tokens))


@pytest.mark.skipif(not topologies.installed(), reason="libtpu is not installed (pip install 'qalora_jax[aot-tpu]')")
@pytest.mark.parametrize('sizes', [(2, 2, 2), (1, 1, 8)], ids=str)
def test_a_step_compiled_for_eight_chips(sizes):
  """With kernels, the same holds on TPU."""
  mesh = mesh_of(sizes, list(topologies.mesh('v5e:2x4', all=8).devices))
  scheme = dataclasses.replace(QALORA, frozen_dtype=jnp.bfloat16)
  config = dataclasses.replace(CONFIG, dtype=jnp.bfloat16)
  _, (state, frozen), step, shardings = built(config, scheme, mesh)
  batch = dict.fromkeys(('tokens', 'loss_mask', 'segments', 'positions'), jax.ShapeDtypeStruct((ROWS, T), jnp.int32))
  with jax.set_mesh(mesh):
    compiled = topologies.compiled(step, state, frozen, batch, **shardings)
  assert 'qmatmul_forward' in compiled.as_text()
  check_traffic(collectives.of(compiled.as_text()), frozen, mesh)


def abstract(config, scheme):
  return jax.eval_shape(decoder.Decoder(config, scheme).init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))['frozen']


def test_leaves_of_a_matrix_lie_together():
  frozen = sharding.place(abstract(CONFIG, MIXED), mesh_of((2, 2, 2)))
  spec = jax.sharding.PartitionSpec
  up = frozen['layers_0']['mlp']['up_proj']['kernel']
  assert up.scale.codes.spec == up.planes[0].spec == spec(None, 'fsdp', 'tensor')
  assert up.scale.absmax.spec == up.scale.mean.spec == spec()
  out = frozen['layers_0']['attention']['o_proj']['kernel']
  assert {part.spec for part in (*out.planes, out.scale, out.offset)} == {spec(None, 'tensor', 'fsdp')}


def test_a_group_never_straddles_devices():
  one = dataclasses.replace(QALORA, quantizers=(('k_proj', affine.Affine(4, 16)), *QALORA.quantizers))
  mesh = mesh_of((1, 8, 1))
  # 64 inputs in groups of 16 are 4 groups, over 8 devices.
  wanted = (
    r"^layers/attention/k_proj/kernel: its axis 'embed' has 4 parts, which do not divide over sharding.fsdp = 8; use "
    r'one of \[1, 2, 4\], or sharding.fallback = "replicate".$'
  )
  with pytest.raises(ValueError, match=wanted):
    sharding.place(abstract(CONFIG, one), mesh)
  held = sharding.place(abstract(CONFIG, one), mesh, fallback='replicate')['layers']['attention']
  assert held['k_proj']['kernel'].scale.spec == jax.sharding.PartitionSpec(None, None, 'tensor')
  assert held['q_proj']['kernel'].scale.spec == jax.sharding.PartitionSpec(None, 'fsdp', 'tensor')


def test_a_word_never_straddles_devices():
  """64 inputs are 8 groups, but of a plane of one bit only two words."""
  three = dataclasses.replace(QALORA, quantizers=(('k_proj', affine.Affine(3, GROUP)), *QALORA.quantizers))
  with pytest.raises(ValueError, match=r"k_proj/kernel: its axis 'embed' has 2 parts.*fsdp = 8; use one of \[1, 2\]"):
    sharding.place(abstract(CONFIG, three), mesh_of((1, 8, 1)))


def test_all_that_does_not_divide_is_named_at_once():
  """A vocabulary, an mlp and the groups of all that read D, with the sizes that suit all of them."""
  odd = dataclasses.replace(CONFIG, vocab_size=75, intermediate_size=120)
  coarse = dataclasses.replace(QALORA, quantizers=(('all', affine.Affine(4, 8)),))
  with pytest.raises(ValueError, match='^the mesh does not divide the weights:') as caught:
    sharding.place(abstract(odd, coarse), mesh_of((1, 1, 8)))
  told = str(caught.value)
  assert "\n  embedding: its axis 'vocab' has 75 parts" in told
  assert "\n  lm_head/kernel: its axis 'vocab' has 75 parts" in told
  assert (
    "\n  layers/mlp/down_proj/kernel: its axis 'mlp' has 15 parts, which do not divide over sharding.tensor" in told
  )
  assert told.endswith('use sharding.tensor out of [1, 3, 5, 15], which suits all, or sharding.fallback = "replicate".')
  many = abstract(CONFIG, dataclasses.replace(QALORA, quantizers=(('all', affine.Affine(4, 16)),)))
  with pytest.raises(ValueError, match=r'and 2 more\nuse sharding.fsdp out of \[1, 2, 4\], which suits all'):
    sharding.place({'one': many, 'other': many}, mesh_of((1, 8, 1)))


def test_meshes_that_do_not_fit_are_refused():
  with pytest.raises(ValueError, match='data=3, fsdp=1, tensor=1 does not fit 8 devices'):
    sharding.make_mesh(data=3)
  with pytest.raises(ValueError, match='is 9 rows, which do not divide over data x fsdp = 8'):
    sharding.check_rows(32, 4, sharding.make_mesh(data=8))
    sharding.check_rows(8, 1, sharding.make_mesh(data=4, fsdp=2))
    sharding.check_rows(36, 4, sharding.make_mesh(data=8))

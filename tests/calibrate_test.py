"""The calibration pass: what it sees, that it can be stopped, and that devices do not change it."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_llama

from qalora_jax import adapters
from qalora_jax import calibrate
from qalora_jax import hf
from qalora_jax import sharding
from qalora_jax.models import decoder
from qalora_jax.models import linear
from qalora_jax.models import rotary
from qalora_jax.quant import affine
from qalora_jax.quant import errors
from qalora_jax.quant import float4
from qalora_jax.quant import gptq
from qalora_jax.quant import method
from qalora_jax.quant import qtensor

CONFIG = small_llama.PLAIN
MATRICES = linear.matrices(CONFIG.sequence[linear.STACK])
ROUND = method.Method(affine.Affine(3, 8))
GPTQ = method.Method(affine.Affine(3, 8), gptq.GPTQ(damping=0.05))
SAMPLES = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (6, 32)).astype(np.int32)
EPS = float(jnp.finfo(jnp.float32).eps)


@pytest.fixture(scope='module')
def directory(tmp_path_factory):
  place = tmp_path_factory.mktemp('dense') / 'model'
  hf.write(place, CONFIG, small_llama.draw(CONFIG))
  return place


@pytest.fixture
def run(directory, tmp_path):
  """run(scheme or method, samples, **more): the pass over the small model."""

  def call(scheme, samples=SAMPLES, **more):
    if not isinstance(scheme, linear.Scheme):
      scheme = linear.Scheme(quantizers=(('all', scheme),))
    defaults = dict(
      mesh=sharding.make_mesh(data=1, devices=jax.devices()[:1]),
      batch=4,
      partial=tmp_path / 'partial',
      settings={'a': 1},
    )
    return calibrate.quantize(hf.Source(directory, CONFIG), CONFIG, scheme, samples, **defaults | more)

  return call


def leaves(tree):
  return jax.tree.leaves_with_path(tree, is_leaf=lambda node: isinstance(node, qtensor.QTensor))


def dense(tree):
  is_q = lambda node: isinstance(node, qtensor.QTensor)
  return jax.tree.map(lambda node: qtensor.dequantize(node) if is_q(node) else node, tree, is_leaf=is_q)


def inputs_of(frozen, layer):
  """{matrix: its inputs [tokens, I]} in float64, of the model whose dense weights are `frozen`, written out again."""
  tree = jax.tree.map(lambda w: np.asarray(w, np.float64), frozen)
  B, T = SAMPLES.shape
  H, K, C = CONFIG.num_attention_heads, CONFIG.num_key_value_heads, CONFIG.head_dim
  x, found = tree['embedding'][SAMPLES], {}
  angles = np.arange(T)[:, None] * np.asarray(
    rotary.frequencies(CONFIG.rope_theta, CONFIG.head_dim, CONFIG.rope_scaling), np.float64
  )
  cos, sin = (f(angles)[None, :, None] for f in (np.cos, np.sin))

  def norm(x, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + CONFIG.rms_norm_eps) * scale

  def rotate(x):
    one, two = np.split(x, 2, -1)
    return np.concatenate([one * cos - two * sin, two * cos + one * sin], -1)

  for index in range(layer + 1):
    own = jax.tree.map(lambda w, index=index: w[index], tree['layers'])
    kernels = {f'{part}/{name}': own[part][name]['kernel'] for part in ('attention', 'mlp') for name in own[part]}
    h = norm(x, own['attention_norm']['scale'])
    found |= dict.fromkeys(('attention/q_proj', 'attention/k_proj', 'attention/v_proj'), h)
    q, k, v = ((h @ kernels[f'attention/{name}_proj']).reshape(B, T, -1, C) for name in 'qkv')
    q, k, v = rotate(q), np.repeat(rotate(k), H // K, 2), np.repeat(v, H // K, 2)
    scores = np.einsum('bthc,bshc->bhts', q, k) / np.sqrt(C) + np.where(np.tri(T), 0, -np.inf)
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    y = np.einsum('bhts,bshc->bthc', scores / scores.sum(-1, keepdims=True), v).reshape(B, T, -1)
    found['attention/o_proj'] = y
    x = x + y @ kernels['attention/o_proj']
    h = norm(x, own['mlp_norm']['scale'])
    found |= dict.fromkeys(('mlp/gate_proj', 'mlp/up_proj'), h)
    gate = h @ kernels['mlp/gate_proj']
    y = gate / (1 + np.exp(-gate)) * (h @ kernels['mlp/up_proj'])
    found['mlp/down_proj'] = y
    x = x + y @ kernels['mlp/down_proj']
  return {name: value.reshape(-1, value.shape[-1]) for name, value in found.items()}


def test_without_samples_it_is_what_quantizing_on_load_gives(run, directory):
  scheme = linear.Scheme(quantizers=(('all', ROUND),))
  small_llama.same(run(scheme, None).frozen, hf.load(directory, CONFIG, scheme))


@pytest.mark.parametrize('true_sequential', [True, False])
def test_every_matrix_sees_the_inputs_that_the_quantized_ones_before_it_make(run, true_sequential):
  """The reported output error is that of the inputs of a model written out again in float64, quantized so far."""
  result = run(ROUND, true_sequential=true_sequential)
  original, quantized = small_llama.draw(CONFIG), dense(result.frozen)
  reported = {row['weight']: row['output_error'] for row in result.rows}
  assert len(reported) == 7 * 3
  for layer in range(3):
    for at, matrix in enumerate(MATRICES):
      # What stands in the model when this matrix is looked at.
      now = jax.tree.map(np.array, original)
      for other_layer in range(layer + 1):
        for other_at, other in enumerate(MATRICES):
          if other_layer < layer or (true_sequential and other_at < at):
            part, name = other.split('/')
            now['layers'][part][name]['kernel'][other_layer] = quantized['layers'][part][name]['kernel'][other_layer]
      x, (part, name) = inputs_of(now, layer)[matrix], matrix.split('/')
      w, q = (np.asarray(tree['layers'][part][name]['kernel'][layer], np.float64) for tree in (original, quantized))
      want = np.sum((x @ (q - w)) ** 2) / np.sum((x @ w) ** 2)
      # Float32 activations after at most three layers of sums of 40 products, squared.
      assert reported[f'layers/{layer}/{matrix}'] == pytest.approx(want, rel=2 * 3 * 7 * 40 * EPS)


def test_gptq_beats_rounding_on_every_output(run, tmp_path):
  rounded, better = run(ROUND), run(GPTQ, partial=tmp_path / 'other')
  lost = {key: sum(row[key] for row in rounded.rows) for key in ('output_error', 'weight_error')}
  lost_by_gptq = {key: sum(row[key] for row in better.rows) for key in lost}
  assert lost_by_gptq['output_error'] < lost['output_error']
  assert lost_by_gptq['weight_error'] > lost['weight_error']
  assert jax.tree.structure(better.frozen) == jax.tree.structure(rounded.frozen)


def test_a_mesh_changes_nothing(run, tmp_path):
  """Six samples on eight devices: the filled rows carry no weight, and columns quantized apart are the same codes."""
  alone = run(GPTQ, mesh=sharding.make_mesh(data=1, devices=jax.devices()[:1]), batch=6)
  meshed = run(GPTQ, mesh=sharding.make_mesh(data=2, fsdp=2, tensor=2), partial=tmp_path / 'meshed')
  same = total = 0
  for (_, one), (_, other) in zip(leaves(alone.frozen), leaves(meshed.frozen), strict=True):
    if isinstance(one, qtensor.QTensor):
      same += int((qtensor.codes(one) == qtensor.codes(other)).sum())
      total += one.size
  # Sums over other batches round otherwise, which moves a weight that lies on the edge between two codes.
  assert same / total > 0.999
  for one, other in zip(alone.rows, meshed.rows, strict=True):
    assert one['output_error'] == pytest.approx(other['output_error'], rel=0.01)


def test_stopped_and_gone_on_is_never_stopped(run, tmp_path):
  begun = calibrate.Beginning('calibrated', 2, seed=3)
  scheme = linear.Scheme(quantizers=(('all', GPTQ),), adapter=adapters.Adapter('qalora', 2, 4.0))
  whole = run(scheme, beginning=begun, partial=tmp_path / 'whole')

  def stop(text, count=1):
    if len(list((tmp_path / 'partial').glob('layer-*'))) == 2:
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    run(scheme, beginning=begun, progress=stop)
  left = {path.name: path.stat().st_mtime_ns for path in (tmp_path / 'partial').glob('layer-*')}
  assert sorted(left) == ['layer-00000.safetensors', 'layer-00001.safetensors']
  resumed = run(scheme, beginning=begun)
  small_llama.same(resumed.frozen, whole.frozen)
  small_llama.same(resumed.params, whole.params)
  without_time = lambda rows: [{key: value for key, value in row.items() if key != 'seconds'} for row in rows]
  assert without_time(resumed.rows) == without_time(whole.rows)
  now = {path.name: path.stat().st_mtime_ns for path in (tmp_path / 'partial').glob('layer-*')}
  assert {name: now[name] for name in left} == left
  with pytest.raises(ValueError, match='unfinished quantization of other settings'):
    run(scheme, beginning=begun, settings={'a': 2})


def test_neighbours_that_agree_share_a_stack(run, tmp_path):
  """Bits, group and method by ordered patterns; the model computes what its dense weights say."""
  rules = (
    (r'layers/0/', method.Method(affine.Affine(8, 8))),
    (r'down_proj', method.Method(float4.Float4(group=20, double=True))),
    (r'layers/\d+/attention/o_proj', None),
    ('all', GPTQ),
  )
  frozen = run(linear.Scheme(quantizers=rules)).frozen
  assert sorted(name for name in frozen if name.startswith('layers')) == ['layers_0', 'layers_1']
  first, rest = frozen['layers_0'], frozen['layers_1']
  assert {leaf.bits for _, leaf in leaves(first) if isinstance(leaf, qtensor.QTensor)} == {8}
  assert rest['mlp']['down_proj']['kernel'].levels == 'nf4' and rest['attention']['q_proj']['kernel'].bits == 3
  assert rest['attention']['q_proj']['kernel'].shape == (2, 24, 32)
  assert not isinstance(rest['attention']['o_proj']['kernel'], qtensor.QTensor)
  one = dense(frozen)
  one['layers'] = jax.tree.map(lambda a, b: np.concatenate([a, b]), one.pop('layers_0'), one.pop('layers_1'))
  logits = jax.jit(decoder.Decoder(CONFIG).apply)
  tokens = jnp.asarray(SAMPLES[:2])
  want = logits({'frozen': one}, tokens)
  got = logits({'frozen': frozen}, tokens)
  np.testing.assert_allclose(got, want, rtol=0, atol=3 * 7 * 40 * EPS * float(jnp.abs(want).max()))


@pytest.mark.parametrize('budget', [8.0, 10.0])
def test_a_budget_is_kept_and_spent_where_it_helps(run, tmp_path, budget):
  """At most `budget` bits a weight, and no more lost than by any uniform width that fits in it."""
  made = {bits: method.Method(affine.Affine(bits, 8, scale_dtype='float16')) for bits in (8, 4, 3, 2)}
  chosen = run(made[4], budget=budget)
  assert spent(leaf for _, leaf in leaves(chosen.frozen)) <= budget
  picked = json.loads((tmp_path / 'partial' / 'chosen.json').read_text())
  assert len(picked) == 21
  source = small_llama.draw(CONFIG)
  inputs = [inputs_of(source, layer) for layer in range(3)]

  def outcome(bits_of):
    """The summed relative output error on the dense model's inputs, as it was minimised, and the bits per weight."""
    total, used = 0.0, []
    for layer in range(3):
      for matrix in MATRICES:
        part, name = matrix.split('/')
        w, x = source['layers'][part][name]['kernel'][layer], inputs[layer][matrix].astype(np.float32)
        used.append(made[bits_of(f'layers/{layer}/{matrix}')](w))
        total += float(errors.relative_output_error(qtensor.dequantize(used[-1]), w, x.T @ x / len(x)))
    return total, spent(used)

  ours = outcome(picked.__getitem__)
  fitting = [
    lost for bits in made if (result := outcome(lambda name, bits=bits: bits))[1] <= budget for lost in result[:1]
  ]
  assert fitting and ours[1] <= budget
  assert ours[0] <= min(fitting) * (1 + 1e-3)  # inputs in float32 there, in float64 here
  if budget == 10.0:
    assert len(set(picked.values())) > 1 and ours[0] < 0.9 * min(fitting)


def spent(nodes):
  """Stored bits per weight of the quantized matrices among `nodes`."""
  quantized = [node for node in nodes if isinstance(node, qtensor.QTensor)]
  return sum(qtensor.bits_per_weight(q) * q.size for q in quantized) / sum(q.size for q in quantized)


def test_an_impossible_budget_is_refused_before_anything_is_read(run, directory, monkeypatch):
  monkeypatch.setattr(calibrate, 'Activations', lambda *_: pytest.fail('activations were made'))
  with pytest.raises(ValueError, match='budget'):
    run(GPTQ, budget=3.0)


def test_the_head_is_calibrated_too(run):
  scheme = linear.Scheme(quantizers=(('lm_head', dataclasses.replace(GPTQ, refined=0.01)),))
  result = run(scheme)
  assert isinstance(result.frozen['lm_head']['kernel'], qtensor.QTensor)
  assert [row['weight'] for row in result.rows] == ['lm_head']
  assert 0 < result.rows[0]['output_error'] < 0.1


def test_nan_and_a_singular_hessian_are_named(run, directory, tmp_path):
  with pytest.raises(ValueError, match=r'layers/0/.*damping'):
    run(dataclasses.replace(GPTQ, solver=gptq.GPTQ(damping=0.0)), SAMPLES[:1, :4])
  tree = small_llama.draw(CONFIG)
  tree['layers']['mlp']['up_proj']['kernel'][1, 2, 3] = np.nan
  hf.write(tmp_path / 'broken', CONFIG, tree)
  broken = hf.Source(tmp_path / 'broken', CONFIG)
  with pytest.raises(ValueError, match='model.layers.1.mlp.up_proj.weight holds NaN or infinite entries'):
    calibrate.quantize(
      broken,
      CONFIG,
      linear.Scheme(quantizers=(('all', ROUND),)),
      None,
      mesh=sharding.make_mesh(),
      partial=tmp_path / 'other',
      settings={},
    )

"""The kernels for TPUs as their compiler takes them: v5e, v6e and v5p, none of which is here.

What runs is libtpu's compiler, on CPU; nothing is executed.  Numbers are held by the interpreted tests.
"""

import collections
import dataclasses
import functools
import itertools
import math
import re

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qalora_jax import adapters
from qalora_jax import step as step_lib
from qalora_jax import topologies
from qalora_jax.kernels import qmatmul
from qalora_jax.models import decoder
from qalora_jax.models import linear
from qalora_jax.quant import affine
from qalora_jax.quant import qtensor

pytestmark = pytest.mark.skipif(
  not topologies.installed(), reason="libtpu is not installed (pip install 'qalora_jax[aot-tpu]', Linux on x86-64)"
)

FORMS = {
  '8': qtensor.Form(8, 32),
  '4': qtensor.Form(4, 32),
  '3': qtensor.Form(3, 32),
  '2': qtensor.Form(2, 32),
  'nf4': qtensor.Form(4, 32, 'nf4', offset='none'),
}


@dataclasses.dataclass(frozen=True)
class Case:
  """A product: its sizes, the form of its weights, where it is compiled for."""

  chip: str
  form: str
  group: int
  rows: int
  shape: tuple[int, int]
  dtype: str
  stacked: bool
  transposed: bool

  def legal(self) -> bool:
    """Groups divide the inputs; and large float32 products, six passes of the MXU each, take long to compile."""
    large = self.dtype == 'float32' and self.rows > 16 and self.shape[0] * self.shape[1] > 2**20
    return not large and (self.group == -1 or self.shape[0] % self.group == 0)

  def pairs(self) -> set:
    """What a case covers: every two of its values."""
    return set(itertools.combinations(vars(self).items(), 2))

  def __str__(self):
    inputs, outputs = self.shape
    words = [self.chip, self.form, f'g{self.group}', f'{self.rows}x{inputs}x{outputs}', self.dtype]
    return '-'.join(words + ['stacked'] * self.stacked + ['transposed'] * self.transposed)


VALUES = {
  'chip': ['v5e', 'v6e', 'v5p'],
  'form': list(FORMS),
  'group': [32, 64, 128, -1],
  'rows': [1, 16, 2047, 2048],
  'shape': [(4096, 11008), (11008, 4096), (4096, 4096), (288, 768), (768, 288), (128, 344)],
  'dtype': ['bfloat16', 'float32'],
  'stacked': [False, True],
  'transposed': [False, True],
}


def pairwise() -> list[Case]:
  """Cases in which every two legal values of VALUES meet: of random cases always the one that covers most anew."""
  rng = np.random.default_rng(0)
  draw = lambda fixed: Case(**{name: values[rng.integers(len(values))] for name, values in VALUES.items()} | fixed)
  everything = [Case(*values) for values in itertools.product(*VALUES.values())]
  left = set().union(*(case.pairs() for case in everything if case.legal()))
  chosen = []
  while left:
    fixed = dict(min(left, key=str))
    drawn = [case for case in (draw(fixed) for _ in range(100)) if case.legal()]
    chosen.append(max(drawn, key=lambda case: len(case.pairs() & left)))
    left -= chosen[-1].pairs()
  return chosen


def abstract(form: qtensor.Form, shape: tuple[int, ...]) -> qtensor.QTensor:
  """The shapes of a matrix of `form`, or of a stack of them."""
  return jax.eval_shape(form, jax.ShapeDtypeStruct(shape, jnp.float32))


@pytest.mark.parametrize('case', pairwise(), ids=str)
def test_every_kernel_compiles(case):
  """By `qmatmul`, as a model calls it: the product, or its gradient in x."""
  form = dataclasses.replace(FORMS[case.form], group=case.group)
  w = abstract(form, (3, *case.shape) if case.stacked else case.shape)
  x, y = (jax.ShapeDtypeStruct((case.rows, size), case.dtype) for size in case.shape)

  def multiply(x, w, layer):
    return qmatmul.qmatmul(x, qtensor.in_stack(w, layer) if case.stacked else w, impl='tpu')

  def transposed(x, dy, w, layer):
    return jax.vjp(lambda x: multiply(x, w, layer), x)[1](dy)[0]

  weights = w, jax.ShapeDtypeStruct((), jnp.int32)
  with jax.set_mesh(topologies.chip(case.chip)):
    compiled = topologies.compiled(*((transposed, x, y) if case.transposed else (multiply, x)), *weights)
  assert kernels(compiled.as_text()) == ['qmatmul_transpose' if case.transposed else 'qmatmul_forward']


def kernels(text: str) -> list[str]:
  """The names of the Pallas kernels in a compiled program, sorted."""
  return sorted(re.findall(r'%(\w+?)(?:\.\d+)? = [^\n]*custom_call_target="tpu_custom_call"', text))


# Layers y = x + down(up(x)^2) of 4 bits, of LLaMA-7B's sizes for decoding and of smaller ones for training, but so many
# that what they keep is still too large for VMEM.  Their groups fill registers (of 44 groups in a stack, say, XLA makes
# another copy, in the kernels' layout).
GROUP = 32
DECODED, TRAINED = (4096, 11008), (512, 1536)


def layers(sizes: tuple[int, int], count: int):
  """({name: a stack of weights without offsets}, {name: their offsets}), abstract."""
  form = qtensor.Form(4, GROUP)
  stacks = {'up': abstract(form, (count, *sizes)), 'down': abstract(form, (count, *sizes[::-1]))}
  return {name: w.replace(offset=None) for name, w in stacks.items()}, {name: w.offset for name, w in stacks.items()}


def run(x, weights, offsets, checkpoint=False):
  """x through all layers in a scan that reads packed weights where they lie."""

  def body(x, layer):
    index, offsets = layer
    multiply = lambda x, name: qmatmul.qmatmul(
      x, qtensor.in_stack(weights[name], index).replace(offset=offsets[name]), impl='tpu'
    )
    return x + multiply(multiply(x, 'up') ** 2, 'down'), None

  indices = jnp.arange(offsets['up'].shape[0], dtype=jnp.int32)
  return jax.lax.scan(jax.checkpoint(body) if checkpoint else body, x, (indices, offsets))[0]


def step(x, weights, offsets, checkpoint=False):
  """The gradient of the offsets."""
  loss = lambda offsets: run(x, weights, offsets, checkpoint).astype(jnp.float32).sum()
  return jax.grad(loss)(offsets)


def scanned(function, rows: int, sizes: tuple[int, int], count: int):
  """(bytes of temporary memory, instructions that make a layer's packed planes) of `function` compiled for v5e."""
  weights, offsets = layers(sizes, count)
  x = jax.ShapeDtypeStruct((rows, sizes[0]), jnp.bfloat16)
  with jax.set_mesh(topologies.chip('v5e')):
    compiled = topologies.compiled(function, x, weights, offsets)
  text = compiled.as_text()
  assert set(kernels(text)) >= {'qmatmul_forward'}
  return compiled.memory_analysis().temp_size_in_bytes, copied(text, weights.values())


def copied(text: str, stacks) -> list[str]:
  """The instructions of a compiled program that make packed planes of one layer of a stack."""
  shapes = '|'.join({','.join(map(str, plane.shape[1:])) for w in stacks for plane in w.planes})
  # A view of what lies elsewhere makes nothing.
  made = re.compile(rf'= \(?[us]32\[(?:1,)?(?:{shapes})\]\S* (?!parameter|get-tuple-element|bitcast)')
  return [line for line in text.splitlines() if made.search(line)]


def test_decoding_reads_the_stack_where_it_lies():
  """Nothing packed is copied and nothing dense is made: one dense matrix is 86 MiB."""
  (few, _), (many, copies) = (scanned(run, 16, DECODED, count) for count in (2, 8))
  assert copies == []
  assert many == pytest.approx(few, abs=2**20)
  assert many < math.prod(DECODED) * 2 / 20


@pytest.mark.parametrize('checkpoint', [False, True])
def test_a_training_step_keeps_activations_alone(checkpoint):
  """What a layer adds to memory is what autodiff must keep of it, with 10 % more at most.

  That is up(x) in bfloat16 and both pooled inputs in float32, or, with a checkpoint, x in bfloat16.
  """
  rows, (narrow, wide) = 256, TRAINED
  function = functools.partial(step, checkpoint=checkpoint)
  (few, _), (many, copies) = (scanned(function, rows, TRAINED, count) for count in (1024, 1280))
  kept = rows * narrow * 2 if checkpoint else rows * (wide * 2 + (narrow + wide) // GROUP * 4)
  assert 0.5 * kept < (many - few) / 256 <= 1.1 * kept
  assert copies == []


def test_a_model_multiplies_by_kernels_alone():
  """A training step and a generated token of a LLaMA: kernels for all seven matrices, and no packed weight copied."""
  quantizers, adapter = (('all', affine.Affine(4, GROUP)),), adapters.Adapter('qalora', 4, 8.0)
  scheme = linear.Scheme(quantizers=quantizers, adapter=adapter, frozen_dtype=jnp.bfloat16)
  sizes = dict(vocab_size=256, hidden_size=256, intermediate_size=768, num_hidden_layers=3)
  heads = dict(num_attention_heads=4, num_key_value_heads=2)
  model = decoder.Decoder(decoder.Config(**sizes, **heads, dtype=jnp.bfloat16, remat='full'), scheme)
  tokens = jax.ShapeDtypeStruct((2, 128), jnp.int32)
  variables = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), tokens))
  tx = optax.adam(1e-3)
  state = jax.eval_shape(functools.partial(step_lib.init_state, tx), variables['params'])
  batch = dict.fromkeys(('tokens', 'loss_mask', 'segments', 'positions'), tokens)
  train = functools.partial(step_lib.train_step, model, tx, 0, 1)
  with jax.set_mesh(topologies.chip('v5e')):
    trained = topologies.compiled(train, state, variables['frozen'], batch).as_text()
    token = topologies.compiled(model.apply, variables, jax.ShapeDtypeStruct((2, 1), jnp.int32)).as_text()
  matrices = [w for w in jax.tree.leaves(variables['frozen'], is_leaf=is_quantized) if is_quantized(w)]
  # Under remat='full' every product is made again, but for the layer's last, of which only the pooled input is kept.
  assert collections.Counter(kernels(trained)) == {'qmatmul_forward': 7 + 6, 'qmatmul_transpose': 7}
  assert kernels(token) == ['qmatmul_forward'] * 7
  for text in trained, token:
    assert copied(text, matrices) == []


@pytest.mark.parametrize('split', [{'outputs': 'tensor'}, {'inputs': 'tensor'}], ids=['columns', 'rows'])
def test_every_device_of_a_mesh_runs_the_kernel_on_its_part(split):
  """Two of four chips share the rows, two the weights; what a sum over inputs gives is added over the two."""
  w = abstract(qtensor.Form(4, GROUP), (512, 512)).replace(split=qtensor.Split(('data',), **split))
  mesh = topologies.mesh('v5e:2x2', data=2, tensor=2)
  place = lambda shape, dtype, *axes: jax.ShapeDtypeStruct(
    shape, dtype, sharding=jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
  )
  w = jax.tree.map(lambda leaf: place(leaf.shape, leaf.dtype, split.get('inputs'), split.get('outputs')), w)
  with jax.set_mesh(mesh):
    x = place((32, 512), jnp.bfloat16, 'data', split.get('inputs'))
    text = topologies.compiled(qmatmul.qmatmul, x, w).as_text()
  (call,) = re.findall(r'= bf16\[(\d+,\d+)\]|= f32\[(\d+,\d+)\]', ''.join(custom_calls(text)))
  assert call == (('16,256', '') if 'outputs' in split else ('', '16,512'))
  assert ('all-reduce' in text) == ('inputs' in split)
  assert 'all-gather' not in text


def custom_calls(text: str) -> list[str]:
  """The kernels' lines of a compiled program, up to the call."""
  return re.findall(r'%qmatmul_\w+(?:\.\d+)? = [^\n]*?custom-call\(', text)


def is_quantized(leaf) -> bool:
  return isinstance(leaf, qtensor.QTensor)

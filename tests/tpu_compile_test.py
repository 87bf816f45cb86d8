"""The kernels for TPUs as their compiler takes them: v5e, v6e and v5p, none of which is here.

What runs is libtpu's compiler, on CPU; nothing is executed.  Numbers are held by the interpreted tests.
"""

import dataclasses
import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import topologies
from qalora_jax.kernels import plan
from qalora_jax.kernels import product
from qalora_jax.kernels import qmatmul
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

  def legal(self) -> bool:
    """Groups divide the inputs."""
    return self.group == -1 or self.shape[0] % self.group == 0

  def pairs(self) -> set:
    """What a case covers: every two of its values."""
    return set(itertools.combinations(vars(self).items(), 2))

  def __str__(self):
    inputs, outputs = self.shape
    stacked = '-stacked' if self.stacked else ''
    return f'{self.chip}-{self.form}-g{self.group}-{self.rows}x{inputs}x{outputs}-{self.dtype}{stacked}'


VALUES = {
  'chip': list(topologies.CHIPS),
  'form': list(FORMS),
  'group': [32, 64, 128, -1],
  'rows': [1, 16, 2047, 2048],
  'shape': [(4096, 11008), (11008, 4096), (4096, 4096), (288, 768), (768, 288), (128, 344)],
  'dtype': ['bfloat16', 'float32'],
  'stacked': [False, True],
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
  """Forward and transposed, by `qmatmul` as a model calls it."""
  form = dataclasses.replace(FORMS[case.form], group=case.group)
  w = abstract(form, (3, *case.shape) if case.stacked else case.shape)
  x = jax.ShapeDtypeStruct((case.rows, case.shape[0]), case.dtype)

  def both(x, w, layer):
    w = qtensor.in_stack(w, layer) if case.stacked else w
    y, back = jax.vjp(lambda x: qmatmul.qmatmul(x, w, impl='tpu'), x)
    return y, back(y)

  with jax.set_mesh(topologies.chip(case.chip)):
    text = topologies.compiled(both, x, w, jax.ShapeDtypeStruct((), jnp.int32)).as_text()
  assert kernels(text) == ['qmatmul_forward', 'qmatmul_transpose']


def kernels(text: str) -> list[str]:
  """The names of the Pallas kernels in a compiled program, sorted."""
  return sorted(re.findall(r'%(\w+?)(?:\.\d+)? = [^\n]*custom_call_target="tpu_custom_call"', text))


# A LLaMA-7B MLP: h = gate(x) * up(x), y = x + down(h).  Without the nonlinearity what autodiff keeps is plain to count.
MODEL, MLP, GROUP = 4096, 11008, 32
DENSE = MODEL * MLP * 2


def mlps(layers: int):
  """A stack of MLPs in 4 bits: {name: (weights without offsets, offsets)}, abstract."""
  form = qtensor.Form(4, GROUP)
  shapes = {'gate': (MODEL, MLP), 'up': (MODEL, MLP), 'down': (MLP, MODEL)}
  stacks = {name: abstract(form, (layers, *shape)) for name, shape in shapes.items()}
  return {name: w.replace(offset=None) for name, w in stacks.items()}, {name: w.offset for name, w in stacks.items()}


def run(x, weights, offsets, checkpoint=False):
  """x through all layers of the stack, in a scan that reads packed weights where they lie."""

  def body(x, layer):
    index, offsets = layer
    own = {name: qtensor.in_stack(w, index).replace(offset=offsets[name]) for name, w in weights.items()}
    multiply = lambda x, name: qmatmul.qmatmul(x, own[name])
    return x + multiply(multiply(x, 'gate') * multiply(x, 'up'), 'down'), None

  count = offsets['gate'].shape[0]
  body = jax.checkpoint(body) if checkpoint else body
  return jax.lax.scan(body, x, (jnp.arange(count, dtype=jnp.int32), offsets))[0]


def step(x, weights, offsets, checkpoint=False):
  """The gradient of the offsets."""
  loss = lambda offsets: run(x, weights, offsets, checkpoint).astype(jnp.float32).sum()
  return jax.grad(loss)(offsets)


@functools.cache
def scanned(function, rows: int, layers: int):
  """`function` compiled for v5e."""
  x = jax.ShapeDtypeStruct((rows, MODEL), jnp.bfloat16)
  with jax.set_mesh(topologies.chip('v5e')):
    return topologies.compiled(function, x, *mlps(layers))


def temporary(compiled) -> int:
  return compiled.memory_analysis().temp_size_in_bytes


def copied(compiled, weights) -> list[str]:
  """The instructions that make a layer's packed planes or scales (a view of them makes nothing)."""
  own = {(leaf.shape[-2:]) for leaf in jax.tree.leaves(weights)}
  shapes = '|'.join(rf'(?:1,)?{rows},{columns}' for rows, columns in sorted(own))
  made = re.compile(rf'= \(?(?:u32|s32|f32)\[(?:{shapes})\]\S* (?!parameter|get-tuple-element|bitcast)[\w-]+\(')
  return [line.strip() for line in compiled.as_text().splitlines() if made.search(line)]


def test_decoding_reads_the_stack_where_it_lies():
  few, many = scanned(run, 16, 2), scanned(run, 16, 8)
  assert copied(many, mlps(8)[0]) == []
  assert temporary(many) == pytest.approx(temporary(few), abs=2**20)
  assert temporary(many) < DENSE / 20


def checkpointed(*arguments):
  return step(*arguments, checkpoint=True)


@pytest.mark.parametrize('function', [step, checkpointed])
def test_training_keeps_activations_alone(function):
  """What a layer adds to memory is what autodiff must keep of it, with 10 % more at most.

  Without a checkpoint: gate(x), up(x) in bfloat16 and the three pooled inputs in float32; with one: x.
  """
  rows = 2048
  few, many = scanned(function, rows, 8), scanned(function, rows, 16)
  pooled = rows * (2 * MODEL + MLP) // GROUP * 4
  kept = rows * MODEL * 2 if function is checkpointed else 2 * rows * MLP * 2 + pooled
  grown = (temporary(many) - temporary(few)) / 8
  assert grown <= 1.1 * kept
  assert copied(many, mlps(16)[0]) == []

"""Products left to XLA, compiled for an H100: what stays in memory.  Sizes are those of LLaMA-7B's MLP in 4 bits."""

import jax
import jax.numpy as jnp
import pytest

from qalora_jax.kernels import plan
from qalora_jax.kernels import product
from qalora_jax.kernels import qmatmul
from qalora_jax.kernels import xla
from qalora_jax.quant import qtensor

D, F, GROUP, RANK, TOKENS = 4096, 11008, 32, 16, 2048
# Bytes of one matrix, dense in bfloat16.
DENSE = 2 * D * F
S = jax.ShapeDtypeStruct


def matrix(inputs, outputs, *leading):
  """A matrix, or a stack of them, abstract."""
  return jax.eval_shape(lambda: qtensor.Form(4, GROUP)(jnp.zeros((*leading, inputs, outputs))))


def mlp(*leading):
  """gate, up, down."""
  return [matrix(D, F, *leading), matrix(D, F, *leading), matrix(F, D, *leading)]


def adapters(*leading):
  """A and B of QA-LoRA for each of `mlp`."""
  form = lambda w: (S((*leading, w.groups, RANK), jnp.float32), S((*leading, RANK, w.shape[-1]), jnp.float32))
  return [form(w) for w in mlp()]


def block(x, weights):
  gate, up, down = weights
  hidden = jax.nn.silu(qmatmul.qmatmul(x, gate)) * qmatmul.qmatmul(x, up)
  return x + qmatmul.qmatmul(hidden, down)


def adapted(x, weights, own):
  return block(x, [w.replace(offset=w.offset + a @ b) for w, (a, b) in zip(weights, own, strict=True)])


def kept():
  """The bytes that one layer keeps between forward and backward: what autodiff holds beside A, B and the weights."""
  x, weights, own = S((TOKENS, D), jnp.bfloat16), mlp(), adapters()
  pull = jax.eval_shape(lambda x, w, own: jax.vjp(lambda x, own: adapted(x, w, own), x, own)[1], x, weights, own)
  given = {(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves((weights, own))}
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pull) if (leaf.shape, leaf.dtype) not in given)


def step(layers, remat):
  """The gradients of every A and B of a scanned model, its packed weights read where they lie in their stacks."""

  def loss(own, x, stacks):
    def body(x, scanned):
      at, own = scanned
      return adapted(x, [qtensor.in_stack(stack, at) for stack in stacks], own), None

    body = jax.checkpoint(body) if remat else body
    return jax.lax.scan(body, x, (jnp.arange(layers), own))[0].astype(jnp.float32).sum()

  return jax.grad(loss), (adapters(layers), S((TOKENS, D), jnp.bfloat16), mlp(layers))


@pytest.mark.parametrize('rows', [1, 16, 256])
def test_a_product_holds_one_dense_matrix(h100, rows):
  compiled = h100.compile(lambda x, w: qmatmul.qmatmul(x, w, 'xla'), S((rows, D), jnp.bfloat16), matrix(D, F))
  # Beside it the float32 sums, of up to four parts of the inputs where rows are few.
  assert DENSE <= compiled.temporary <= DENSE + (4 if rows <= 16 else 1) * 4 * rows * F


@pytest.mark.parametrize('remat', [False, True])
def test_nothing_dense_is_kept_for_the_backward_pass(h100, remat):
  """A scanned model grows by what its layers keep, and by no matrix; under remat a layer keeps its input alone.

  The gradients of a layer's adapters are results, but may stand in temporary memory first.
  """
  sizes = []
  for layers in (4, 8):
    function, args = step(layers, remat)
    sizes.append(h100.compile(function, *args).temporary)
  activations = 2 * TOKENS * D if remat else kept()
  gradients = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(adapters()))
  assert 0.9 * activations <= (sizes[1] - sizes[0]) / 4 <= 1.1 * activations + gradients


def decode(x, layers):
  """Sixty-four steps through four layers, of which layers(i) is one."""

  def one(_, x):
    for at in range(4):
      x = block(x, layers(at))
    return x

  with plan.using('xla'):
    return jax.lax.fori_loop(0, 64, one, x)


def alone(x, matrices):
  return decode(x, lambda at: matrices[at])


def test_a_decode_loop_keeps_no_matrix_dense(h100):
  """Of twelve matrices one or two are dense at a time: the next may be made while the last is still being read."""
  compiled = h100.compile(alone, S((16, D), jnp.bfloat16), [mlp()] * 4)
  assert compiled.temporary <= 2.1 * DENSE


def test_nor_where_it_reads_a_stack(h100):
  stacks = mlp(4)
  stacked = lambda x, stacks: decode(x, lambda at: [qtensor.in_stack(stack, at) for stack in stacks])
  compiled = h100.compile(stacked, S((16, D), jnp.bfloat16), stacks)
  # The offsets are sliced once, before the loop.
  assert compiled.temporary <= 2.1 * DENSE + sum(4 * stack.offset.size for stack in stacks)


def test_it_would_without_the_barrier(h100, monkeypatch):
  """What `xla` ties its operands together for; if this fails, XLA has changed and the barrier can go."""
  monkeypatch.setattr(xla, '_within_loops', lambda x, w: (x, w))
  compiled = h100.compile(alone, S((16, D), jnp.bfloat16), [mlp()] * 4)
  assert compiled.temporary >= 12 * DENSE


@pytest.mark.parametrize('rows', [1, 16, 2048])
def test_blackwell_falls_back(b200, rows):
  """Mosaic GPU refuses it by name; the plan goes on to those that run there, and what it takes compiles."""
  x, w = S((rows, D), jnp.bfloat16), matrix(D, F)
  with jax.set_mesh(b200.mesh):
    device = product.device()
  assert device == product.Device('gpu', 'NVIDIA B200')
  wanted = product.Product.of(x, w)
  assert plan.choose(wanted, device).name in ('triton', 'xla')
  with pytest.raises(product.Refused, match='mosaic_gpu'):
    plan.choose(wanted, device, 'mosaic_gpu')
  assert b200.compile(qmatmul.qmatmul, x, w).temporary <= DENSE + 4 * max(4 * 16, rows) * F

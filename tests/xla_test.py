"""The products left to XLA, made in parts: as those of the whole matrix, on CPU, and nowhere else.

Sums of the same products may be taken in another order: float32's error is at most sqrt(n) * eps for n terms of random
signs, relative to the largest sum, and two such sums are compared.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qalora_jax.kernels import product as product_lib
from qalora_jax.kernels import xla
from qalora_jax.quant import double
from qalora_jax.quant import qtensor

CPU = product_lib.Device('cpu')
INPUTS, OUTPUTS, GROUP = 192, 136, 32


def matrix(bits: int, levels: str = 'integer', doubled: bool = False, layers: int = 0) -> qtensor.QTensor:
  """Random codes, scales and, for integer levels, offsets; with `layers` the last of a stack."""
  keys = jax.random.split(jax.random.key(bits), 3)
  leading = (layers,) if layers else ()
  codes = jax.random.randint(keys[0], (*leading, INPUTS, OUTPUTS), -(2 ** (bits - 1)), 2 ** (bits - 1))
  scale = jax.random.uniform(keys[1], (*leading, INPUTS // GROUP, OUTPUTS), minval=0.01, maxval=0.1)
  offset = jax.random.normal(keys[2], scale.shape) if levels == 'integer' else None
  scale = double.compress(scale) if doubled else scale
  found = qtensor.QTensor(qtensor.pack(codes, bits), scale, offset, bits=bits, group=GROUP, levels=levels)
  return qtensor.in_stack(found, layers - 1) if layers else found


def close(got, want, terms: int):
  eps = float(jnp.finfo(want.dtype).eps)
  limit = 2 * np.sqrt(terms) * eps * float(jnp.abs(want).max())
  np.testing.assert_allclose(got.astype(jnp.float32), want.astype(jnp.float32), rtol=0, atol=limit)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
  'w',
  [
    *(pytest.param(dict(bits=bits), id=f'{bits}') for bits in (8, 4, 3, 2)),
    pytest.param(dict(bits=4, levels='nf4', doubled=True), id='nf4'),
    pytest.param(dict(bits=3, layers=2), id='stack'),
  ],
)
def test_parts_are_the_whole(w, dtype, monkeypatch):
  w = matrix(**w)
  x = jax.random.normal(jax.random.key(0), (2, 3, INPUTS), dtype)
  dy = jax.random.normal(jax.random.key(1), (2, 3, OUTPUTS), dtype)
  # Parts of 48 outputs, the last of which overlaps, and of 64 inputs.
  monkeypatch.setattr(xla, '_PART', INPUTS * OUTPUTS * x.dtype.itemsize // 3 + 1)
  forward = xla.plan(product_lib.Product.of(x, w), CPU)
  backward = xla.plan(product_lib.Product.of(dy, w, transposed=True), CPU)
  assert (forward, backward) == (48, 64)
  close(xla.forward(x, w, forward, out_dtype=dtype), xla.forward(x, w, out_dtype=dtype), INPUTS)
  close(xla.transpose(dy, w, backward, out_dtype=dtype), xla.transpose(dy, w, out_dtype=dtype), OUTPUTS)


def test_only_large_matrices_on_one_cpu_are_made_in_parts(monkeypatch):
  large = product_lib.Product(512, 4096, 11008, 4, 32, 'integer', 'float32', True)
  assert xla.plan(large, CPU) == 256
  assert xla.plan(large, product_lib.Device('gpu', 'NVIDIA H100 80GB HBM3')) is None
  with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((2,), ('data',))):
    assert xla.plan(large, CPU) is None
  assert xla.plan(product_lib.Product(512, 288, 768, 4, 32, 'integer', 'float32', True), CPU) is None
  # A group of a whole column leaves nothing to cut the inputs by.
  whole = product_lib.Product(512, 4096, 11008, 4, 4096, 'integer', 'float32', True, transposed=True)
  assert xla.plan(whole, CPU) is None


def test_a_part_is_all_that_is_dense_at_once():
  """The temporaries of a product with 4096 x 2048 weights (32 MiB in float32) are a part and little more."""
  shapes = jax.eval_shape(qtensor.Form(4, 32), jax.ShapeDtypeStruct((4096, 2048), jnp.float32))
  x = jax.ShapeDtypeStruct((4, 4096), jnp.float32)
  width = xla.plan(product_lib.Product.of(x, shapes), CPU)
  made = jax.jit(lambda x, w: xla.forward(x, w, width, out_dtype=x.dtype)).lower(x, shapes).compile()
  assert made.memory_analysis().temp_size_in_bytes < 1.25 * xla._PART

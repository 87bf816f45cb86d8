"""`qmatmul`: the one reader of frozen weights, and the gradient, written once above all who can multiply."""

import functools

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from qalora_jax.kernels import mesh
from qalora_jax.kernels import plan
from qalora_jax.kernels import product
from qalora_jax.kernels import reference
from qalora_jax.quant import latent
from qalora_jax.quant import qtensor

# The name of every result, for `jax.checkpoint_policies`: a kernel is no dot.
PRODUCT = 'qmatmul'


def qmatmul(x, w, impl: str | None = None) -> jax.Array:
  """x [..., I] @ w [I, O] for a dense array, a `QTensor` or a `Latent`; float32 accumulation, result in x's dtype.

  For a QTensor the gradient reaches x and the offsets alone:

      dx = dy @ dense(w).T        doffset = pool(x).T @ dy

  so between forward and backward only pool(x) [..., I / group] is kept, never x and never a dense matrix
  (the dense matrix is made again); a matrix without offsets keeps none of it.

  For a Latent the result is that of w.quantize(), and so is dx; w learns by `latent.gradient` of x.T @ dy, summed in
  float32.  Between forward and backward x and w are kept.

  `impl`: 'xla', 'tpu', 'mosaic_gpu', 'triton', each of which raises where it cannot run; 'reference' (the
  specification under plain autodiff); None: what `plan.using` says for a whole model, else `plan.choose` chooses.  The
  environment's QALORA_QMATMUL is what `plan.using` begins with.

  Raises ValueError, at trace time, for shapes that do not meet, a stack of matrices, planes that are not those of w's
  bits and inputs, and an `impl` that is unknown or cannot make this product on this device (`product.Refused`, which
  says why); TypeError for an x that is neither float32, bfloat16 nor float16.
  """
  # Here, and not where a product is planned: a gradient is traced later, and is the same one's.
  impl = impl or plan.using.value
  if x.shape[-1] != w.shape[-2]:
    raise ValueError(f'qmatmul: x has {x.shape[-1]} inputs, the weight {w.shape[-2]}.')
  trains = isinstance(w, latent.Latent)
  if not trains and not isinstance(w, qtensor.QTensor):
    y = jnp.dot(x, w.astype(x.dtype), preferred_element_type=jnp.float32).astype(x.dtype)
    return checkpoint_name(y, PRODUCT)
  if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
    raise TypeError(f'qmatmul: x is {x.dtype}; it multiplies float32, bfloat16 and float16.')
  if not trains:
    qtensor.check(w)
    if len(w.shape) != 2:
      raise ValueError(
        f'qmatmul: the weight is a stack {w.shape}; take one matrix (`qtensor.in_stack`) or map over it.'
      )
  if impl == 'reference':
    return _specified(x, w) if trains else reference.qmatmul(x, w)
  return checkpoint_name(_rounded(x, w, impl) if trains else _quantized(x, w, impl), PRODUCT)


def _multiply(x, w, impl, transposed=False):
  """x @ dense(w), or x @ dense(w).T, by whoever `impl` or the plan says."""
  made, division = _planned(x, w, impl, transposed)
  if made.name == 'xla':
    # XLA divides its own products, and maps them; a kernel is one device's.
    multiply = made.module.transpose if transposed else made.module.forward
    return mesh.guide(lambda x, w: multiply(x, w, made.blocks, out_dtype=x.dtype), x, w, division, transposed)
  return _by_kernel(impl, transposed)(x, w)


def _planned(x, w, impl, transposed) -> tuple[plan.Plan, mesh.Division]:
  division = mesh.divide(x, w)
  if division is None:
    # Nobody said how this product is divided: XLA finds out, and a kernel that is asked for by name makes all of it.
    division, impl = mesh.Division(), impl or 'xla'
  return plan.choose(division.local(product.Product.of(x, w, transposed)), product.device(), impl), division


def _by_kernel(impl, transposed):
  """The product by a kernel, with a vmap of its own: more rows where x alone is mapped, else one after the other."""

  @jax.custom_batching.custom_vmap
  def call(x, w):
    made, division = _planned(x, w, impl, transposed)
    multiply = made.module.transpose if transposed else made.module.forward

    def local(x, w, out_dtype):
      if made.interpret:
        # On CPU, XLA folds words that are constants into narrow integers wrongly: what is interpreted is no constant.
        x, w = jax.lax.optimization_barrier((x, w))
      return multiply(x, w, made.blocks, out_dtype=out_dtype, interpret=made.interpret)

    return mesh.run(local, x, w, division, transposed)

  @call.def_vmap
  def _(size, mapped, x, w):
    x_mapped, w_mapped = mapped
    if not any(jax.tree.leaves(w_mapped)):
      return _multiply(x, w, impl, transposed), True
    pick = lambda leaf, own, at: leaf[at] if own else leaf
    own = lambda at: jax.tree.map(lambda leaf, own: pick(leaf, own, at), (x, w), (x_mapped, w_mapped))
    one = lambda at: _multiply(*own(at), impl, transposed)
    return jax.lax.map(one, jnp.arange(size)), True

  return call


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _quantized(x, w, impl):
  return _multiply(x, w, impl)


def _keep(x, w, impl):
  # Without offsets, an empty array that remembers over which axes of a shard_map x differs.
  return _multiply(x, w, impl), (x[..., :0] if w.offset is None else reference.pool(x, w.groups), w)


def _gradients(impl, kept, dy):
  pooled, w = kept
  dx = _over_copies(_multiply(dy, w, impl, transposed=True), pooled)
  if w.offset is None:
    return dx, None
  doffset = _over_copies(mesh.offset_gradient(pooled, dy, w), w.offset)
  return dx, w.replace(planes=None, scale=None, layer=None, offset=doffset.astype(w.offset.dtype))


def _over_copies(gradient, primal):
  """The gradient of all copies of what is the same on devices where `gradient` differs, inside a shard_map."""
  varying = lambda value: jax.typeof(value).manual_axis_type.varying
  axes = tuple(sorted(varying(gradient) - varying(primal)))
  return jax.lax.psum(gradient, axes) if axes else gradient


_quantized.defvjp(_keep, _gradients)


def _specified(x, w: latent.Latent):
  """`reference.qmatmul` of w.quantize(), differentiable in w."""
  dense = latent.fake_quantize(w)
  return jnp.dot(x.astype(jnp.float32), dense, precision=jax.lax.Precision.HIGHEST).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _rounded(x, w, impl):
  return _multiply(x, _used(w), impl)


def _estimates(impl, kept, dy):
  x, w = kept
  rows, drows = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
  precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
  ddense = jnp.dot(rows.T, drows, precision=precision, preferred_element_type=jnp.float32)
  return _multiply(dy, _used(w), impl, transposed=True), latent.gradient(w, ddense)


_rounded.defvjp(lambda x, w, impl: (_rounded(x, w, impl), (x, w)), _estimates)


def _used(w: latent.Latent) -> qtensor.QTensor:
  """w.quantize(), with nothing of the rounding fused into the products: they are those of the exported QTensor."""
  return jax.lax.optimization_barrier(w.quantize())

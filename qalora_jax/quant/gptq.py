"""GPTQ (Frantar et al., 2023): codes chosen one input after another, the error of each made up for by those after it.

I inputs, O outputs.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from qalora_jax.quant import qtensor
from qalora_jax.quant import quantizer as quantizer_lib


@dataclasses.dataclass(frozen=True)
class GPTQ:
  """The choices of `quantize`; hashable, so that weights of one choice share one compiled program.

  * damping: what is added to the Hessian's diagonal, as a share of its mean.
  * block: inputs whose errors reach the rest of the matrix together.  Unless groups are stale it changes the speed
    and nothing but rounding; where groups are fitted one by one, a block ends with its group.
  * act_order: inputs by decreasing diagonal of the Hessian instead of as they stand; needs static_groups.
  * static_groups: scales and offsets of all groups from the weights as given, before any error has been passed on.
  * stale_groups: those of a group from weights that lack the errors of the block in which it starts, as in the
    released code, where blocks are longer than groups.  By default each group is fitted when it is reached, to
    weights that hold every error before it.

  Raises ValueError for values that cannot be or do not go together.
  """

  damping: float = 0.01
  block: int = 128
  act_order: bool = False
  static_groups: bool = False
  stale_groups: bool = False

  def __post_init__(self):
    if not self.damping >= 0:
      raise ValueError(f'base.gptq.damping = {self.damping}; it is at least 0 (a share of the mean diagonal).')
    if self.block < 1:
      raise ValueError(f'base.gptq.block = {self.block}; it is a count of inputs, at least 1.')
    if self.act_order and not self.static_groups:
      raise ValueError(
        'base.gptq.act_order without base.gptq.static_groups: the inputs of a group would no longer be neighbours, '
        'and QA-LoRA could not be merged exactly; set base.gptq.static_groups = True as well.'
      )
    if self.stale_groups and self.static_groups:
      raise ValueError(
        'base.gptq.stale_groups and base.gptq.static_groups are two moments to fit a group; choose one of them.'
      )


def quantize(w, hessian, quantizer: quantizer_lib.Quantizer, options: GPTQ, name: str = 'a weight') -> qtensor.QTensor:
  """w [I, O] in the codes of `quantizer`, chosen so that x @ w changes little over the calibration inputs x.

  hessian [I, I] is the mean of x x^T over the tokens.  With damping and U upper triangular such that
  U^T U = hessian^-1 (Frantar et al., 2023, Algorithm 1), for every input i in turn

      codes[i] = encode(w[i])     error = (w[i] - decode(codes[i])) / U[i, i]     w[i:] -= U[i, i:]^T error

  which is the best that the inputs after i can do about the rounding of i.  Outputs do not see each other, so w may be
  sharded over them (with the hessian on every device).  An input that was always 0 (a diagonal of 0) gets weights 0
  before they are rounded; its diagonal counts as 1, in the mean that damping is a share of too, as in the released
  code.  A hessian that is a multiple of the identity gives `quantizer(w)`.

  Raises ValueError, calling the weight `name`, where the group does not divide the inputs, the shapes do not fit, or
  the Hessian is not finite or not positive definite.
  """
  if w.ndim != 2 or hessian.shape != (w.shape[0], w.shape[0]):
    raise ValueError(
      f'{name}: w of shape {w.shape} with a Hessian of shape {hessian.shape}; they are [I, O] and [I, I].'
    )
  group = qtensor.check_group(w.shape[0], quantizer.group, name)
  if not jnp.isfinite(hessian).all():
    raise ValueError(f'{name}: its Hessian is not finite; its inputs overflowed: calibrate in a wider dtype.')
  upper, order, dead = _factor(hessian, options.damping, options.act_order)
  if not jnp.isfinite(upper).all():
    raise ValueError(
      f'{name}: its Hessian is not positive definite in float32 with base.gptq.damping = {options.damping}; '
      f'use more, for example {10 * options.damping or 0.01:g}, or more calibration tokens.'
    )
  return _sweep(w, upper, order, dead, quantizer, options, group)


@functools.partial(jax.jit, static_argnames='act_order')
def _factor(hessian, damping, act_order: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
  """U [I, I] with its axes in the order in which inputs are taken, that order [I], and which inputs are dead [I]."""
  hessian = hessian.astype(jnp.float32)
  dead = jnp.diagonal(hessian) == 0
  diagonal = jnp.where(dead, 1.0, jnp.diagonal(hessian))
  order = jnp.argsort(diagonal, descending=True) if act_order else jnp.arange(diagonal.size)
  # From the last input to the first, H = L L^T; turned round again L is upper triangular, and its inverse is U.  The
  # inverse of H, whose own factor U also is, never has to be made: its rounding errors are larger.
  damped = hessian + jnp.diag(jnp.where(dead, 1.0, 0.0) + damping * diagonal.mean())
  turned = order[::-1]
  lower = jnp.linalg.cholesky(damped[turned][:, turned])
  inverse = jax.scipy.linalg.solve_triangular(lower, jnp.eye(diagonal.size), lower=True)
  return inverse[::-1, ::-1], order, dead


@functools.partial(jax.jit, static_argnames=('quantizer', 'options', 'group'))
def _sweep(w, upper, order, dead, quantizer, options: GPTQ, group: int) -> qtensor.QTensor:
  I, O = w.shape
  w = jnp.where(dead[:, None], 0.0, w.astype(jnp.float32))
  fit = lambda w: quantizer.fit(w.reshape(I // group, group, O))
  nothing = lambda w: jax.tree.map(lambda part: jnp.zeros(part.shape, part.dtype), jax.eval_shape(fit, w))

  def block(start, size, state):
    """Codes for `size` inputs, then their errors to all others; those before, which are done, get none."""
    w, codes, fitted = state
    reach = jax.lax.dynamic_slice_in_dim(upper, start, size)

    def step(rows, this):
      i, reach, own = this
      scale, offset = jax.tree.map(lambda part: part[own], fitted)
      code = quantizer.encode(rows[i], scale, offset)
      error = (rows[i] - quantizer.decode(code, scale, offset)) / reach[i]
      return rows - reach[:, None] * error[None], (code, error)

    within = jax.lax.dynamic_slice_in_dim(reach, start, size, axis=1)
    inputs = jax.lax.dynamic_slice_in_dim(order, start, size)
    rows = jax.lax.dynamic_slice_in_dim(w, start, size)
    _, (found, errors) = jax.lax.scan(step, rows, (jnp.arange(size), within, inputs // group))
    w = w - jnp.matmul(reach.T, errors, precision=jax.lax.Precision.HIGHEST)
    return w, codes.at[inputs].set(found, unique_indices=True), fitted

  def stale(start, size, state):
    w, codes, fitted = state
    starts = group * jnp.arange(I // group)
    begun = (starts >= start) & (starts < start + size)
    fitted = jax.tree.map(lambda new, old: jnp.where(begun[:, None], new, old), fit(w), fitted)
    return block(start, size, (w, codes, fitted))

  def fresh(own, state):
    w, codes, fitted = state
    new = quantizer.fit(jax.lax.dynamic_slice_in_dim(w, own * group, group))
    fitted = jax.tree.map(lambda old, new: jax.lax.dynamic_update_index_in_dim(old, new, own, 0), fitted, new)
    return _blocks(block, own * group, group, options.block, (w, codes, fitted))

  state = w[order], jnp.zeros((I, O), jnp.int32), (fit if options.static_groups else nothing)(w)
  if options.static_groups:
    state = _blocks(block, 0, I, options.block, state)
  elif options.stale_groups:
    state = _blocks(stale, 0, I, options.block, state)
  else:
    state = jax.lax.fori_loop(0, I // group, fresh, state)
  _, codes, fitted = state
  return quantizer.store(codes, *fitted)


def _blocks(step, start, length: int, block: int, state):
  """state = step(at, size, state) for [start, start + length) in blocks; the last may be shorter."""
  block = min(block, length)
  whole, rest = divmod(length, block)
  state = jax.lax.fori_loop(0, whole, lambda index, state: step(start + index * block, block, state), state)
  return step(start + whole * block, rest, state) if rest else state

"""Adapters that start from the quantization error, or from the weights themselves, instead of from nothing.

I inputs, O outputs, G group size, L groups (I // G), R rank.

A matrix w [I, O] becomes a frozen matrix and an adapter with frozen + update ~ w.  LoRA's update is s A B; QA-LoRA's is
repeat(s A B, G), the same for all inputs of a group.  With P [I, L] that repeats (P^T sums over groups; for LoRA G = 1
and P = 1), the s A B of rank R that leaves least of an error E [I, O] in the norm tr(E^T H E) is a reduced-rank
regression on pooled inputs (Izenman, 1975; for P = 1 CLoQ, Deng et al., 2025):

    K = P^T H P = F F^T     M = K^-1 P^T H E     s A B = F^-T SVD_R(F^T M)

M is the best without a bound on the rank: E itself for LoRA, for QA-LoRA what `refine.refine` adds to the offsets.  In
the Frobenius norm, H = 1, it is the group means of E, and s A B = SVD_R(M).  Any F with F F^T = K gives the same s A B;
a Cholesky factor is cheaper than the symmetric root, and as exact where a few inputs are far larger than the others.
"""

import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
from jax.scipy import linalg
import numpy as np

from qalora_jax.adapters import lora
from qalora_jax.quant import qtensor
from qalora_jax.quant import refine

KINDS = ('pissa', 'loftq', 'calibrated')
# LoftQ goes on while a step lowers the error at least to this part of it.
_WORTH = 0.999
_dot = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def initialize(kind: str, adapter, w, quantize, hessian=None, iterations: int = 5, damping: float = 0.01, key=None):
  """(frozen, node): w [I, O] as quantize(...) plus an `adapter` that starts with a part of w or of its rounding error.

  kind:
  * 'pissa' (Meng et al., 2024): s A B is the best for E = w in the Frobenius norm; frozen = quantize(w - update).
  * 'loftq' (Li et al., 2023): frozen = quantize(w - update) and s A B the best for E = w - frozen, in turn, from
    update = 0, at most `iterations` times.  A step that lowers the error by less than 0.1 % is not taken and ends it:
    the published loop, which makes all its steps, may raise the error again at 2 bits.
  * 'calibrated' (CLoQ, Deng et al., 2025): frozen = quantize(w) and s A B the best for E = w - frozen in the norm of
    `hessian` [I, I], the mean of x x^T over calibration inputs, with K damped by m = damping * mean(diag(K)): LoRA
    leaves least of tr(E^T H E) + m |E|^2, QA-LoRA of tr(E^T H E) + m |s A B|^2, and for R >= L is `refine.refine`.

  Where a constant added to a group of w changes nothing but its offset (affine, asymmetric, with a real zero), 'pissa'
  for QA-LoRA does no more than move a part of the offsets into the adapter, and 'loftq' ends after one step: those
  after it would each take the same update from the offsets and add it to the adapter.

  adapter: an `adapters.Adapter` of kind 'lora' or 'qalora'.  quantize: a function [I, O] -> QTensor, or None for a base
  that stays dense (LoRA with 'pissa' only).  The node is a lora.LoRA or qalora.QALoRA of plain float32 arrays, the
  singular values of A B shared alike: A^T A = B B^T.  Merging it gives where training starts, not what was trained.
  Components without a singular value (R > min(L, O), or nothing to correct) are those of a fresh adapter: A drawn with
  `key` (jax.random.key(0) if None), B zero.

  Cost, besides `quantize`: for every fit 4 n L O operations and the eigenvectors of a matrix of side n = min(L, O),
  about 10 n^3 (L = I for LoRA); for 'calibrated' also a Cholesky factor, L^3 / 3, and products with it, 2 L^2 O.  Not
  under jit: it looks at the errors.

  Raises ValueError for an unknown kind, for what a kind needs and lacks, and where the result is not finite.
  """
  _check(kind, adapter, w, quantize, hessian, iterations)
  w = jnp.asarray(w, jnp.float32)
  # PiSSA's LoRA alone needs no codes of w itself; QA-LoRA takes the group from them.
  rounded = w if kind == 'pissa' and adapter.kind == 'lora' else quantize(w)
  fresh = nn.unbox(adapter.init(jax.random.key(0) if key is None else key, rounded, ('inputs', 'outputs')))
  group = 1 if adapter.kind == 'lora' else rounded.group
  # A component below the rounding of w corrects nothing.
  floor = jnp.finfo(jnp.float32).eps * jnp.linalg.norm(w)

  if kind == 'pissa':
    node = _fit(fresh, w, floor, group=group)
    rest = w - _update(node, group)
    frozen = rest if quantize is None else quantize(rest)
  elif kind == 'loftq':
    frozen, node = _alternate(fresh, w, floor, rounded, quantize, group, iterations)
  else:
    frozen = rounded
    node = _fit(fresh, _error(w, frozen), floor, group=group, hessian=hessian, damping=damping)
  if not (np.isfinite(node.a).all() and np.isfinite(node.b).all()):
    raise ValueError(
      f'{kind}: the adapter has entries that are not finite.  If w and the Hessian are finite, the Hessian is close to '
      f'singular: use more damping than {damping}, or more calibration inputs.'
    )
  return frozen, node


def _check(kind, adapter, w, quantize, hessian, iterations):
  if kind not in KINDS:
    raise ValueError(f'adapter initialisation {kind!r}; it is one of {KINDS}.')
  if adapter.kind not in ('lora', 'qalora'):
    raise ValueError(f'{kind} is for adapters of kind lora and qalora, not {adapter.kind}.')
  if quantize is None and (kind != 'pissa' or adapter.kind != 'lora'):
    raise ValueError(f'{kind} for {adapter.kind} needs a quantized base; a dense one can have pissa for lora.')
  if kind == 'calibrated' and hessian is None:
    raise ValueError('calibrated needs a Hessian, the mean of x x^T over calibration inputs; or use loftq.')
  if hessian is not None and hessian.shape != (w.shape[0], w.shape[0]):
    raise ValueError(f'a Hessian of shape {hessian.shape} for {w.shape[0]} inputs; it is [inputs, inputs].')
  if iterations < 1:
    raise ValueError(f'iterations = {iterations}; loftq makes at least 1.')


def _alternate(fresh, w, floor, rounded, quantize, group: int, iterations: int):
  """LoftQ from `rounded` = quantize(w): (frozen, node) of the last step worth taking."""
  best, least, update = None, float('inf'), None
  for _ in range(iterations):
    frozen = rounded if update is None else quantize(w - update)
    error = _error(w, frozen)
    node = _fit(fresh, error, floor, group=group)
    update = _update(node, group)
    left = float(jnp.linalg.norm(error - update))
    if left >= _WORTH * least:
      break
    best, least = (frozen, node), left
  return best


@jax.jit
def _error(w, q) -> jax.Array:
  return w - qtensor.dequantize(q)


@functools.partial(jax.jit, static_argnames='group')
def _fit(fresh, error, floor, *, group: int, hessian=None, damping: float = 0.0):
  """The adapter `fresh` with the update that leaves least of `error`, in the norm of `hessian` (None: Frobenius)."""
  rank = fresh.a.shape[-1]
  best, factor = _unbounded(fresh, error, group, hessian, damping)
  if factor is None:
    left, right = _leading(best, rank)
  else:
    left, right = _leading(_dot(factor.T, best), rank)
    left = linalg.solve_triangular(factor, left, trans='T', lower=True)
  # left @ right is the update; its own singular values do not depend on the unit of the inputs.
  basis, inner = jnp.linalg.qr(left)
  u, sizes, vt = jnp.linalg.svd(_dot(inner, right), full_matrices=False)
  missing = (0, rank - sizes.size)
  sizes = jnp.pad(sizes, missing)
  share = jnp.sqrt(sizes / _scaling(fresh, group))
  a = jnp.pad(_dot(basis, u), ((0, 0), missing)) * share[None, :]
  b = jnp.pad(vt, (missing, (0, 0))) * share[:, None]
  unused = sizes <= floor
  return fresh.replace(a=jnp.where(unused[None, :], fresh.a, a), b=jnp.where(unused[:, None], 0.0, b))


def _unbounded(fresh, error, group: int, hessian, damping: float):
  """(M [L, O], F [L, L] lower triangular or None where it is a multiple of 1)."""
  if hessian is None:
    return error.reshape(-1, group, error.shape[-1]).mean(1), None
  pooled, half = refine.pool(hessian.astype(jnp.float32), group)
  mean = jnp.diagonal(pooled).mean()
  factor = jnp.linalg.cholesky(pooled + jnp.where(mean == 0, 1.0, damping * mean) * jnp.eye(len(pooled)))
  return error if isinstance(fresh, lora.LoRA) else linalg.cho_solve((factor, True), _dot(half, error)), factor


def _leading(x, rank: int):
  """left [m, k] and right [k, n] with left @ right = SVD_rank(x), x [m, n], k = min(rank, m, n).

  The leading singular vectors of the shorter side come from the Gram matrix.  Squaring blurs those with singular values
  below sqrt(eps) of the largest; as x is projected on what was found, each of them costs at most about eps of the
  largest, both squared.
  """
  m, n = x.shape
  k = min(rank, m, n)
  if m <= n:
    vectors = jnp.linalg.eigh(_dot(x, x.T))[1][:, m - k :]
    return vectors, _dot(vectors.T, x)
  vectors = jnp.linalg.eigh(_dot(x.T, x))[1][:, n - k :]
  return _dot(x, vectors), vectors.T


def _scaling(node, group: int) -> float:
  return node.scaling if isinstance(node, lora.LoRA) else node.scaling(group)


@functools.partial(jax.jit, static_argnames='group')
def _update(node, group: int) -> jax.Array:
  """What the adapter adds to the dense matrix [I, O]."""
  return jnp.repeat(_scaling(node, group) * _dot(node.a, node.b), group, axis=0)

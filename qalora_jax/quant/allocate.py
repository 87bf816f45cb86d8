"""Bits where they help most: one choice for every weight, least summed error within a budget of stored bits."""

from collections.abc import Hashable
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import math

import numpy as np
from scipy import optimize

# HiGHS takes two objectives for equal that differ by less than 1e-6, so errors are brought to this size.
_LARGEST = 1e4


@dataclasses.dataclass(frozen=True)
class Candidate:
  """A weight of `size` numbers, and for each choice (say, bits) its stored bits in all and its error.

  Errors of different weights are summed, so they have one unit.
  """

  name: str
  size: int
  costs: Mapping[Hashable, int]
  errors: Mapping[Hashable, float]


def allocate(candidates: Sequence[Candidate], budget: float) -> dict[str, Hashable]:
  """{name: choice} with the least sum of errors whose stored bits are at most `budget` per weight on average.

  With x[w, c] = 1 where weight w takes choice c, and 0 elsewhere, the multiple-choice knapsack

      minimise sum_wc errors[w, c] x[w, c]
      subject to sum_c x[w, c] = 1 for every w, and sum_wc costs[w, c] x[w, c] <= budget * sum_w size[w]

  is solved as an integer linear programme by HiGHS, as LQ-LoRA (Guo et al., 2023) and HAWQ-V3 (Yao et al., 2021)
  choose bits.  The sum of errors exceeds the best errors' sum by the least possible, to a relative 1e-9.  The same
  arguments give the same choices.  A budget beyond the dearest choices takes the best of everything.

  Raises ValueError for no candidate, one without a choice or with an error that is not finite, and for a budget that
  is NaN or below the cheapest choices.
  """
  _check(candidates)
  size = sum(one.size for one in candidates)
  cheapest = [min(one.costs.values()) for one in candidates]
  smallest, largest = (sum(costs) / size for costs in (cheapest, [max(one.costs.values()) for one in candidates]))
  if not budget >= smallest:
    raise ValueError(
      f'budget = {budget} bits per weight: the choices take from {smallest} to {largest}, scales and offsets counted; '
      'set a budget in that range, or spend fewer bits on scales and offsets by larger groups.'
    )
  # Both relative to the least of each weight: fewer digits, the same choices.
  extra = [cost - least for one, least in zip(candidates, cheapest, strict=True) for cost in one.costs.values()]
  excess = np.array([one.errors[choice] - min(one.errors.values()) for one in candidates for choice in one.costs])
  owner = np.repeat(np.arange(len(candidates)), [len(one.costs) for one in candidates])
  room = _affordable(min(budget, largest), size) - sum(cheapest)
  taken = _solve(owner, extra, excess, room)
  choices = [(one.name, choice) for one in candidates for choice in one.costs]
  return dict(choices[index] for index in taken)


def _check(candidates: Sequence[Candidate]) -> None:
  if not candidates:
    raise ValueError('there is no weight to choose bits for; let base.targets select some.')
  for one in candidates:
    if not one.costs:
      raise ValueError(f'{one.name} has no choice; offer one, or leave this weight dense by base.targets.')
    for choice in one.costs:
      if not math.isfinite(one.errors[choice]):
        raise ValueError(
          f'{one.name}: the error of choice {choice!r} is {one.errors[choice]}; look for numbers that are not finite '
          'in the weight and its inputs, or for inputs that are all 0, or leave it dense by base.targets.'
        )


def _affordable(budget: float, size: int) -> int:
  """The most bits that, divided by `size`, are at most `budget`: 10 bits of 3 weights are within 10 / 3."""
  near = math.floor(budget * size)
  return max(bits for bits in (near - 1, near, near + 1) if bits / size <= budget)


def _solve(owner: np.ndarray, extra: list[int], excess: np.ndarray, room: int) -> np.ndarray:
  """The indices taken, one for each owner in order: sum of `extra` at most `room`, sum of `excess` least."""
  one_each = (owner == np.arange(owner[-1] + 1)[:, None]).astype(float)
  unit = max(math.gcd(*extra), 1)
  # Sums are whole, so that half a unit admits nothing, and keeps rounding from refusing what just fits.
  within = optimize.LinearConstraint([[cost // unit for cost in extra]], ub=room // unit + 0.5)
  bound = excess.max()
  while True:
    found = optimize.milp(
      excess * (_LARGEST / (bound or 1.0)),
      integrality=1,
      bounds=optimize.Bounds(0, (excess <= bound).astype(float)),
      constraints=[optimize.LinearConstraint(one_each, 1, 1), within],
      options={'mip_rel_gap': 0},
    )
    taken = np.flatnonzero(found.x > 0.5) if found.success else []
    if not np.array_equal(owner[taken], np.arange(owner[-1] + 1)) or sum(extra[index] for index in taken) > room:
      raise RuntimeError(f'HiGHS found no choice of bits though there is one: {found.message}')
    total = excess[taken].sum()
    # No choice that alone errs by more than a sum at hand belongs to a least sum.  Without them the errors that are
    # left may be magnified, until what HiGHS takes for equal is nothing beside the sum.
    if total >= bound / 10:
      return taken
    bound = total

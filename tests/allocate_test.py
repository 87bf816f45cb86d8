"""The choice of bits: against every possible choice, at, below and beyond its budget."""

import itertools
import math
import types

import numpy as np
import pytest
from scipy import optimize

from qalora_jax.quant import allocate

BITS = (2, 3, 4, 8)


def _draw(seed, count, spread=1.0, scale=1.0, options=BITS):
  """Weights of odd sizes; errors fall with the bits, log-normal with standard deviation `spread`."""
  rng = np.random.default_rng(seed)
  candidates = []
  for index in range(count):
    size = int(rng.integers(10**3, 10**9))
    costs = {bits: bits * size + int(rng.integers(size)) for bits in options}
    errors = np.sort(scale * np.exp(spread * rng.standard_normal(len(options))))[::-1]
    candidates.append(allocate.Candidate(f'w{index}', size, costs, dict(zip(options, errors.tolist(), strict=True))))
  return candidates


def _average(candidates, choices):
  """Bits per weight."""
  return sum(one.costs[choices[one.name]] for one in candidates) / sum(one.size for one in candidates)


def _excess(candidates, choices):
  """How far the summed error is above that of the best choices; sums of differences, as no digit is lost in them."""
  return math.fsum(one.errors[choices[one.name]] - min(one.errors.values()) for one in candidates)


def _every_choice(candidates):
  names = [one.name for one in candidates]
  return [dict(zip(names, found, strict=True)) for found in itertools.product(*(one.costs for one in candidates))]


def _budgets(candidates, count):
  ends = [[pick(one.costs.values()) for one in candidates] for pick in (min, max)]
  size = sum(one.size for one in candidates)
  return np.linspace(sum(ends[0]) / size, sum(ends[1]) / size, count)


# A spread of 8 is e^8 = 3000 for one standard deviation: the largest error is then some 1e10 times the smallest.
@pytest.mark.parametrize('spread', [0.3, 2.0, 8.0])
@pytest.mark.parametrize('scale', [1e-12, 1.0, 1e12])
@pytest.mark.parametrize('seed', range(3))
def test_no_choice_within_the_budget_errs_less(seed, scale, spread):
  candidates = _draw(seed, 5, spread, scale)
  every = [(_average(candidates, choices), _excess(candidates, choices)) for choices in _every_choice(candidates)]
  for budget in (*_budgets(candidates, 6), math.inf):
    choices = allocate.allocate(candidates, budget)
    least = min(excess for average, excess in every if average <= budget)
    assert _average(candidates, choices) <= budget
    assert _excess(candidates, choices) <= least * (1 + 1e-9)


@pytest.mark.parametrize('budget', [2.6, 3.7, 5.1])
def test_many_weights_match_dynamic_programming(budget):
  rng = np.random.default_rng(3)
  candidates = []
  for index, size in enumerate(rng.integers(20, 60, 60).tolist()):
    errors = np.exp(rng.standard_normal()) * 4.0 ** -np.array(BITS) * rng.uniform(0.8, 1.2, len(BITS))
    costs = {bits: bits * size for bits in BITS}
    candidates.append(allocate.Candidate(f'w{index}', size, costs, dict(zip(BITS, errors.tolist(), strict=True))))
  room = math.floor(budget * sum(one.size for one in candidates))
  # least[b]: the least summed error of the weights so far in at most b bits.
  least = np.zeros(room + 1)
  for one in candidates:
    # Bits 0 to cost - 1 do not pay for this choice.
    ways = [np.r_[np.full(one.costs[c], np.inf), least[: room + 1 - one.costs[c]] + one.errors[c]] for c in BITS]
    least = np.min(ways, axis=0)
  choices = allocate.allocate(candidates, budget)
  assert _average(candidates, choices) <= budget
  found = math.fsum(one.errors[choices[one.name]] for one in candidates)
  # Two sums of 60 errors in another order differ by at most 60 roundings of 2^-53; the solver is trusted with 1e-9.
  np.testing.assert_allclose(found, least[room], rtol=1e-9)


def test_weights_may_have_choices_of_their_own():
  candidates = [
    allocate.Candidate('a', 10, {'nf4': 45}, {'nf4': 3.0}),
    allocate.Candidate('b', 20, {4: 80, (8, 32): 160}, {4: 1.0, (8, 32): 0.5}),
  ]
  assert allocate.allocate(candidates, 205 / 30) == {'a': 'nf4', 'b': (8, 32)}
  assert allocate.allocate(candidates, 204 / 30) == {'a': 'nf4', 'b': 4}


def test_more_bits_never_err_more():
  candidates = _draw(0, 60)
  budgets = _budgets(candidates, 15)
  chosen = [allocate.allocate(candidates, budget) for budget in budgets]
  for budget, choices in zip(budgets, chosen, strict=True):
    assert choices.keys() == {one.name for one in candidates}
    # Every step up lessens an error and costs less than 4 + 1 bits of 10^9 numbers: what is left buys none.
    assert 0 <= budget - _average(candidates, choices) < 5 * 10**9 / sum(one.size for one in candidates)
  excess = [_excess(candidates, choices) for choices in chosen]
  # 1e-9 is what the solver is trusted with.
  assert all(after <= before * (1 + 1e-9) for before, after in itertools.pairwise(excess))
  assert excess[-1] == 0 < excess[-2] < excess[0]


def test_the_ends_take_the_cheapest_and_the_best():
  candidates = _draw(1, 40)
  lowest, highest = _budgets(candidates, 2)
  assert set(allocate.allocate(candidates, lowest).values()) == {2}
  for budget in (highest, 100, math.inf):
    assert set(allocate.allocate(candidates, budget).values()) == {8}


@pytest.mark.parametrize('bits', BITS)
def test_weights_alike_get_alike_bits(bits):
  costs = {own: own * 4096**2 + 64 * 4096**2 // 32 for own in BITS}
  candidates = [allocate.Candidate(f'w{i}', 4096**2, costs, {own: 4.0**-own for own in BITS}) for i in range(224)]
  assert set(allocate.allocate(candidates, bits + 2).values()) == {bits}


def test_bits_go_where_they_help():
  candidates = [
    allocate.Candidate(f'w{i}', 100, {own: own * 100 for own in BITS}, {own: weight * 4.0**-own for own in BITS})
    for i, weight in enumerate((1.0, 1.0, 1000.0, 1.0))
  ]
  assert allocate.allocate(candidates, 3.5) == {'w0': 2, 'w1': 2, 'w2': 8, 'w3': 2}


def test_small_differences_count():
  """Forty gains that differ by parts of 10^-8: the budget goes to the ten largest."""
  gains = 1 + 1e-8 * np.random.default_rng(0).permutation(40)
  candidates = [
    allocate.Candidate(f'w{i}', 64, {2: 128, 4: 256}, {2: gain, 4: 0.0}) for i, gain in enumerate(gains.tolist())
  ]
  choices = allocate.allocate(candidates, 2.5)
  assert {i for i in range(40) if choices[f'w{i}'] == 4} == set(np.argsort(gains)[-10:].tolist())


def test_a_whole_third_is_affordable():
  """10 / 3 in floating point is below ten thirds, yet 10 bits on 3 weights are 10 / 3 as floats divide."""
  candidates = [allocate.Candidate(f'w{i}', 7, {3: 21, 4: 28}, {3: 1.0 + i, 4: 0.0}) for i in range(3)]
  assert allocate.allocate(candidates, 10 / 3) == {'w0': 3, 'w1': 3, 'w2': 4}


def test_equal_errors_and_single_choices_are_no_trouble():
  alike = [allocate.Candidate(f'w{i}', 8, {2: 16, 3: 24}, {2: 0.5, 3: 0.5}) for i in range(4)]
  assert _average(alike, allocate.allocate(alike, 2.5)) <= 2.5
  single = [allocate.Candidate('w', 8, {2: 16}, {2: 0.5})]
  assert allocate.allocate(single, 2.0) == {'w': 2}


def test_the_same_question_has_the_same_answer():
  candidates = [allocate.Candidate(f'w{i}', 64, {2: 128, 4: 256}, {2: 1.0, 4: 0.25}) for i in range(50)]
  first, second = (allocate.allocate(candidates, 3.0) for _ in range(2))
  assert first == second
  assert sorted(first.values()) == [2] * 25 + [4] * 25


@pytest.mark.parametrize('budget', [2.9, 0.0, -1.0, -math.inf, math.nan])
def test_a_budget_out_of_reach_is_refused_with_its_range(budget):
  candidates = [allocate.Candidate('w', 10, {2: 30, 8: 90}, {2: 1.0, 8: 0.0})]
  with pytest.raises(ValueError, match=rf'budget = {budget} bits per weight: the choices take from 3\.0 to 9\.0'):
    allocate.allocate(candidates, budget)


def test_the_smallest_budget_said_is_accepted():
  candidates = _draw(2, 7)
  with pytest.raises(ValueError) as caught:
    allocate.allocate(candidates, 1.0)
  smallest = float(str(caught.value).partition('from ')[2].partition(' to')[0])
  assert set(allocate.allocate(candidates, smallest).values()) == {2}


@pytest.mark.parametrize('error', [math.nan, math.inf])
def test_an_error_that_is_not_finite_is_named(error):
  good = allocate.Candidate('good', 10, {4: 40}, {4: 1.0})
  bad = allocate.Candidate('layers/3/mlp/up_proj', 10, {4: 40, 3: 30}, {4: 1.0, 3: error})
  with pytest.raises(ValueError, match=f'layers/3/mlp/up_proj: the error of choice 3 is {error}'):
    allocate.allocate([good, bad], 4.0)


def test_nothing_to_choose_is_refused():
  with pytest.raises(ValueError, match='no weight to choose bits for'):
    allocate.allocate([], 4.0)
  with pytest.raises(ValueError, match='w has no choice'):
    allocate.allocate([allocate.Candidate('w', 10, {}, {})], 4.0)


@pytest.mark.parametrize(
  'answer',
  [
    types.SimpleNamespace(success=False, x=None, message='gave up'),
    types.SimpleNamespace(success=True, x=np.array([1.0, 1.0]), message='gave up'),
    types.SimpleNamespace(success=True, x=np.array([0.0, 1.0]), message='gave up'),
  ],
  ids=['none', 'two', 'dear'],
)
def test_a_wrong_answer_of_the_solver_is_no_choice(monkeypatch, answer):
  monkeypatch.setattr(optimize, 'milp', lambda *arguments, **settings: answer)
  with pytest.raises(RuntimeError, match='gave up'):
    allocate.allocate([allocate.Candidate('w', 10, {2: 20, 4: 40}, {2: 1.0, 4: 0.0})], 3.0)

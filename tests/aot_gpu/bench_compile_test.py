"""What experiments/bench_qmatmul.py times, compiled for an H100."""

import jax
import pytest

from experiments import bench_qmatmul
from qalora_jax.kernels import plan
from qalora_jax.kernels import product

# As in the measurement: a decode step and a training step, codes in one plane, in two and in a table.
CASES = [
  bench_qmatmul.Case(4096, 11008, rows, bits, 32, direction, 'bfloat16')
  for direction in bench_qmatmul.DIRECTIONS
  for rows, bits in ((1, '4'), (16, '3'), (256, 'nf4'), (2048, '4'))
]


def _expected(case):
  """Backward, and with many rows, it may be xla alone."""
  fused = {'mosaic_gpu': 256, 'triton': 128}
  few = set() if case.backward else {name for name, rows in fused.items() if case.rows <= rows}
  return {bench_qmatmul.DENSE, 'xla'} | few


@pytest.mark.parametrize('case', CASES, ids=str)
def test_programs_compile(h100, case):
  """Each that the plan does not refuse, two products of it; those are never refused whose measurement is the point."""
  with jax.set_mesh(h100.mesh):
    device = product.device()
    impls = [bench_qmatmul.DENSE, *plan.IMPLEMENTATIONS]
    able = [impl for impl in impls if bench_qmatmul.refusal(case, impl, device) is None]
  assert _expected(case) <= set(able)
  for impl in able:
    x, w = case.operands(impl)
    run = bench_qmatmul.program(case.direction, impl)
    compiled = h100.compile(lambda xs, ws, run=run: run(xs, ws), [x] * 2, [w] * 2)
    assert [y.shape for y in compiled.program.out_info] == [(case.rows, 4096 if case.backward else 11008)] * 2

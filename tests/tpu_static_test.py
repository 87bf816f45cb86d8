"""How experiments/tpu_static.py reads a schedule, and two schedules held to the limit that they reach."""

import concurrent.futures
import functools
import multiprocessing

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp
import pytest

from experiments import tpu_static
from qalora_jax import topologies
from qalora_jax.quant import qtensor

# Bundles 1 to 9 are the loop; all but two of them under the pipeline's guard, 4 and 5 skipped but for the first step.
LISTING = """\
LB: loop body
     0   :  { %s0 = inlined_call_operand.hbm [shape: bf16[8,8]] }
   0x1 LB: > { %s1 = sphi %s2, %s3  ;;  %4 = sbr.rel (%p0) target bundleno = 8 (0x8), region = 40 }
   0x2   : > { %v1 = vld [vmem:[#allocation0] sm:$0xff] /*
base_bounds: (64, 32) */ }
   0x3   : > { %5 = sbr.rel (%p1) target bundleno = 6 (0x6), region = 41 }
   0x4   : > { %6 = vst [vmem:[#allocation1] sm:$0xff] %v1 }
   0x5   : > {}
   0x6 PF: > { %v2 = vmatmul.f32.gmra.mxu0 %v1 }
   0x7   : > {}
   0x8 PF: > { %p2 = scmp.ge.s32.totalorder %s1, 2 }
   0x9   : > { %7 = sbr.rel (!%p2) target bundleno = 1 (0x1), region = 39 }
0x1000   :  { %8 = vsyncpa [#allocation5], 1 }
"""


def test_a_step_is_one_pass_through_the_loop_with_its_share_of_what_is_skipped():
  assert tpu_static.cycles(LISTING, 1) == 9
  assert tpu_static.cycles(LISTING, 4) == 9 - 2 * 3 / 4


def test_loops_within_the_loop_are_refused():
  within = LISTING.replace('%v2 = vmatmul', '%9 = sbr.rel (%p3) target bundleno = 6 (0x6)  ;;  %v2 = vmatmul')
  with pytest.raises(RuntimeError, match='loops within the loop'):
    tpu_static.cycles(within, 1)


def test_a_block_moves_when_its_place_changes():
  """On a grid of 2 x 4: x by the first index, w by the second, y by both."""

  def add(x_ref, w_ref, y_ref):
    y_ref[...] = x_ref[...] + w_ref[...]

  call = pl.pallas_call(
    add,
    out_shape=jax.ShapeDtypeStruct((16, 512), jnp.float32),
    grid=(2, 4),
    in_specs=[pl.BlockSpec((8, 128), lambda i, j: (i, 0)), pl.BlockSpec((8, 128), lambda i, j: (0, j))],
    out_specs=pl.BlockSpec((8, 128), lambda i, j: (i, j)),
  )
  program = jax.make_jaxpr(call)(jnp.zeros((16, 128)), jnp.zeros((8, 512)))
  block = 8 * 128 * 4
  assert tpu_static.traffic(program) == ((2, 4), (2 + 8 + 8) * block, (2 + 4 + 8) * block)


@pytest.mark.skipif(not topologies.installed(), reason='libtpu is not installed')
@pytest.mark.parametrize(
  'kernel, rows, shape',
  [('forward', 16, (4096, 4096)), ('forward', 16, (4096, 11008)), ('backward', 2048, (4096, 4096))],
)
def test_four_bits_reach_the_limit(tmp_path, kernel, rows, shape):
  """Decoding that of memory and the transposed product that of the MXU, to a tenth (in a process that may dump)."""
  case = tpu_static.Case('v5e', kernel, qtensor.Form(4, 32), rows, shape)
  spawned = multiprocessing.get_context('spawn')
  begin = functools.partial(tpu_static._begin, str(tmp_path))
  with concurrent.futures.ProcessPoolExecutor(1, spawned, begin) as pool:
    row = pool.submit(tpu_static.measure, str(tmp_path), case).result()
  assert row['limited_by'] == ('mxu' if kernel == 'backward' else 'hbm')
  assert row['reached'] >= 0.9

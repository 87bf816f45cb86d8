"""The two benchmarks end to end on a CPU, as small as they go, and what they say to bad flags."""

import dataclasses
import json
import math

import jax.numpy as jnp
import pytest

from experiments import bench_qmatmul
from experiments import bench_step
from qalora_jax.models import llama

TINY = dataclasses.replace(
  bench_qmatmul.SCALES['cpu'], cache=2**14, products=2, copied=2**16, peak=32, rounds=2, groups=(32,)
)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
  monkeypatch.setitem(bench_qmatmul.SCALES, 'cpu', TINY)


def test_products_are_measured_and_stored(tmp_path, capsys):
  """Side by side with a kernel, interpreted: every row checked, the crossover printed, three files written."""
  place = tmp_path / 'found.v1'
  words = ['--shapes=64x128', '--rows=3', '--bits=3,nf4', '--impls=xla,tpu_interpreted', f'--out={place}']
  bench_qmatmul.main(words)
  content = json.loads((tmp_path / 'found.v1.json').read_text())
  assert {'command', 'commit', 'date', 'machine', 'versions', 'bytes_per_second', 'flops_per_second'} <= set(content)
  rows = content['rows']
  assert [(row['bits'], row['direction'], row['impl']) for row in rows] == [
    (bits, direction, impl)
    for bits in ('3', 'nf4')
    for direction in ('forward', 'backward')
    for impl in ('dense', 'xla', 'tpu_interpreted')
  ]
  # x, y, planes of 2 + 1 bits, scales and offsets of two groups; the product and that with the offsets.
  assert rows[1]['bytes'] == 4 * 3 * (64 + 128) + 128 * 64 * 3 // 8 + 2 * 4 * 2 * 128
  assert rows[1]['flops'] == 2 * 3 * 128 * (64 + 2)
  assert all(0 < row['fastest_us'] <= row['us'] and row['roofline'] > 0 for row in rows)
  assert '# tpu_interpreted forward; time over xla by rows: 3: ' in capsys.readouterr().out
  assert '| 64x128 |' in (tmp_path / 'found.v1.md').read_text()
  assert (tmp_path / 'found.v1.png').read_bytes().startswith(b'\x89PNG')


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('direction', bench_qmatmul.DIRECTIONS)
def test_a_wrong_result_is_told_from_a_rounded_one(direction, dtype):
  case = bench_qmatmul.Case(256, 128, 8, '4', 32, direction, dtype)
  bench = bench_qmatmul.bench(case, 'xla', TINY)
  x, w = bench.xs[0][0], bench.ws[0][0]
  (y,) = bench.run([x], [w])
  assert bench_qmatmul.deviation(x, w, y, direction) <= 1
  # The scales of one group of eight, off by the size of scales.
  wrong = w.replace(scale=w.scale.at[3].add(0.1))
  assert bench_qmatmul.deviation(x, wrong, y, direction) > 1
  assert bench_qmatmul.deviation(x, w, y.at[0, 0].set(jnp.nan), direction) == math.inf
  bench.run = lambda xs, ws: [y * 0 for _ in xs]
  with pytest.raises(AssertionError, match=f'^xla, {direction} 256x128, 8 rows'):
    bench.time()


def test_crossovers_are_lines_of_a_table():
  row = lambda impl, rows, us: {
    'shape': 'a', 'rows': rows, 'bits': '4', 'group': 32, 'direction': 'forward', 'impl': impl, 'us': us,
  }  # fmt: skip
  rows = [row('xla', n, 8.0) for n in (1, 16, 256)]
  rows += [row('triton', 1, 2.0), row('triton', 16, 4.0), row('triton', 256, 16.0)]
  line = "'H100': 16,  # triton forward; time over xla by rows: 1: 0.25, 16: 0.50, 256: 2.00"
  assert list(bench_qmatmul.crossovers(rows, 'NVIDIA H100 80GB HBM3')) == [line]
  assert list(bench_qmatmul.crossovers(rows[:3], 'cpu')) == []


@pytest.mark.parametrize(
  'main, flag, told',
  [
    (
      bench_qmatmul.main,
      '--shapes=4096',
      "argument --shapes: '4096' is no shape; write inputs x outputs as 4096x11008",
    ),
    (bench_qmatmul.main, '--rows=0', "argument --rows: '0' is no number above 0"),
    (bench_qmatmul.main, '--bits=4,5', "argument --bits: '5'; it is one of 8, 4, 3, 2, nf4"),
    (bench_qmatmul.main, '--impls=cuda', "argument --impls: 'cuda'; it is one of xla, tpu, mosaic_gpu, triton"),
    (bench_qmatmul.main, '--groups=48', '64x128: 64 inputs do not divide into groups of 48'),
    (bench_qmatmul.main, '--row=3', 'unrecognized arguments: --row=3'),
    (bench_step.main, '--width=100', 'argument --width: 100 is no multiple of 128, the width of a head'),
    (bench_step.main, '--compile-for=v9', "argument --compile-for: invalid choice: 'v9'"),
  ],
)
def test_bad_flags_are_one_clear_error(main, flag, told, capsys):
  words = [flag] if main is bench_step.main or flag.startswith('--shapes') else ['--shapes=64x128', flag]
  with pytest.raises(SystemExit) as end:
    main(words)
  assert end.value.code == 2
  *_, last = capsys.readouterr().err.strip().splitlines()
  assert told in last


def test_steps_are_measured_and_stored(tmp_path, monkeypatch):
  """Of two methods and of few layers, which is what compiles in time."""
  every = bench_step.schemes
  some = (bench_step.QLORA, bench_step.QALORA[4])
  monkeypatch.setattr(bench_step, 'schemes', lambda *a: {name: every(*a)[name] for name in some})
  monkeypatch.setattr(bench_step, 'COMPARED', some)
  monkeypatch.setattr(bench_step, 'REMATS', ('none',))
  monkeypatch.setattr(bench_step, 'FEW', 1)
  monkeypatch.setattr(bench_step, 'MANY', 2)
  words = ['--layers=1', '--width=128', '--rows=1', '--window=8', '--rank=2', '--rounds=2', f'--out={tmp_path / "s"}']
  bench_step.main(words)
  rows = json.loads((tmp_path / 's.json').read_text())['rows']
  timed = {row['method']: row for row in rows if row['table'] == 'time'}
  assert tuple(timed) == some
  assert timed[bench_step.QLORA]['to_qlora'] == 1.0
  assert all(0 < row['fastest_step_ms'] <= row['step_ms'] and row['utilisation'] > 0 for row in timed.values())
  grown = {row['method']: row['layer_MiB'] for row in rows if row['table'] == 'memory'}
  assert 0 < grown[bench_step.QALORA[4]] < grown[bench_step.QLORA]
  assert 'to_qlora' in (tmp_path / 's.md').read_text()


def test_flops_are_those_of_the_matrices_and_of_attention():
  config = llama.ModelConfig(256, 128, 320, 3, 1, 1)
  matrices = 3 * (4 * 128 * 128 + 3 * 128 * 320) + 256 * 128
  assert bench_step.flops(config, rows=2, window=8) == 16 * (4 * matrices + 3 * 12 * 8 * 128)
  assert bench_step.config(dataclasses.replace(bench_step.SIZES['gpu'], layers=2), jnp.bfloat16, 'none') == (
    llama.ModelConfig(256, 4096, 11008, 2, 32, 32, max_position_embeddings=512, dtype=jnp.bfloat16)
  )

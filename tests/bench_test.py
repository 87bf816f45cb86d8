"""The two benchmarks end to end on a CPU, as small as they go, and what they say to bad flags."""

import dataclasses
import itertools
import json
import math
import time
import types

import jax
import jax.numpy as jnp
import pytest

from experiments import bench_qmatmul
from experiments import bench_step
from qalora_jax import quant
from qalora_jax.models import decoder

TINY = dataclasses.replace(
  bench_qmatmul.SCALES['cpu'], cache=2**14, products=2, copied=2**16, peak=32, rounds=2, groups=(32,), seconds=1e-3
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
  assert content['device'] == 'cpu'
  rows = content['rows']
  # Forward before backward; the dense product once for a shape, rows and direction.
  assert [(row['bits'], row['direction'], row['impl']) for row in rows] == [
    (None if impl == 'dense' else bits, direction, impl)
    for direction in ('forward', 'backward')
    for bits, impls in (('3', ('dense', 'xla', 'tpu_interpreted')), ('nf4', ('xla', 'tpu_interpreted')))
    for impl in impls
  ]
  # x, y, planes of 2 + 1 bits, scales and offsets of two groups; the product and that with the offsets.
  assert rows[1]['bytes'] == 4 * 3 * (64 + 128) + 128 * 64 * 3 // 8 + 2 * 4 * 2 * 128
  assert rows[1]['flops'] == 2 * 3 * 128 * (64 + 2)
  assert all(0 < row['fastest_us'] <= row['us'] and row['roofline'] > 0 for row in rows)
  assert all(row['to_dense'] == pytest.approx(row['us'] / rows[at // 5 * 5]['us']) for at, row in enumerate(rows))
  told = capsys.readouterr().out
  for levels in ('integer', 'codebook'):
    assert f'# tpu_interpreted forward, {levels}; time over xla by rows: 3: ' in told
  assert '| 64x128 |' in (tmp_path / 'found.v1.md').read_text()
  assert (tmp_path / 'found.v1.png').read_bytes().startswith(b'\x89PNG')


def test_what_was_measured_is_not_measured_again(tmp_path, monkeypatch, capsys):
  """On the same kind of device, whatever the commit; `--minutes` ends a run between two cases, with those stored."""
  place = tmp_path / 'found'
  found = lambda: json.loads((tmp_path / 'found.json').read_text())
  words = ['--shapes=64x128', '--rows=3', '--bits=4', '--impls=xla', f'--out={place}']
  # A clock on which a case takes a minute: at its beginning and before each of the two.
  clock = itertools.count(0, 61)
  monkeypatch.setattr(
    bench_qmatmul, 'time', types.SimpleNamespace(perf_counter=time.perf_counter, monotonic=lambda: next(clock) / 2)
  )
  bench_qmatmul.main([*words, '--minutes=1'])
  (dense, xla) = first = found()['rows']
  assert (dense['impl'], xla['impl'], xla['direction']) == ('dense', 'xla', 'forward')
  assert '1 minutes are over: 2 rows' in capsys.readouterr().out
  assert (tmp_path / 'found.md').exists()
  made = []
  bench = bench_qmatmul.bench
  monkeypatch.setattr(
    bench_qmatmul, 'bench', lambda case, impl, scale: (made.append(impl), bench(case, impl, scale))[1]
  )
  bench_qmatmul.main(words)
  assert made == ['dense', 'xla']
  assert found()['rows'][:2] == first
  assert [row['direction'] for row in found()['rows']] == ['forward'] * 2 + ['backward'] * 2
  bench_qmatmul.main(words)
  assert made == ['dense', 'xla']
  # Another device's rows are neither mixed with these nor lost.
  (tmp_path / 'found.json').write_text(json.dumps({**found(), 'device': 'TPU v9'}))
  with pytest.raises(SystemExit):
    bench_qmatmul.main(words)
  assert "found.json is of 'TPU v9', this is 'cpu'; name another file with --out" in capsys.readouterr().err


@pytest.mark.parametrize('name', bench_qmatmul.SCALES)
def test_every_default_case_can_be_made(name):
  """The widest matrices, 4 bits and few rows first; no shape with a group that does not divide its inputs."""
  scale = bench_qmatmul.SCALES[name]
  cases = bench_qmatmul.every_case(scale)
  for case in cases:
    assert jax.tree.leaves(case.operands('xla'))
  assert {case.shape for case in cases} == set(scale.shapes)
  assert len(set(cases)) == len(cases)
  if name != 'cpu':
    foremost = cases[: 4 * 5 * 2]
    assert {case.shape for case in foremost} == set(bench_qmatmul.FOREMOST)
    assert all((case.bits, case.direction) == ('4', 'forward') and case.rows <= 16 for case in foremost)
    assert '288x768' in scale.shapes and 128 in scale.groups


def test_fused_kernels_are_measured_on_gpus_up_to_512_rows():
  device = bench_qmatmul.product_lib.Device('gpu', 'NVIDIA H100 80GB HBM3')
  due = lambda rows, done=(): bench_qmatmul.due(
    bench_qmatmul.Case(4096, 11008, rows, '4', 32, 'forward', 'bfloat16'),
    ('xla', 'tpu_interpreted'), bench_qmatmul.SCALES['gpu'], device, set(done),
  )  # fmt: skip
  assert due(512) == ['dense', 'xla', 'tpu_interpreted']
  assert due(2048) == ['dense', 'xla']
  assert due(512, [('4096x11008', 512, None, None, 'forward', 'dense')]) == ['xla', 'tpu_interpreted']


def test_a_round_has_as_many_launches_as_take_so_long():
  """A program of 2 products that takes 0.1 ms, and 1 ms more to be launched first and waited for."""
  bench = bench_qmatmul.Bench(None, 'xla', None, [[None] * 2], [[None]])
  bench.time = lambda: (1e-3 + bench.launches * 1e-4) / bench.launches / 2
  counts = []
  timing = bench.time
  bench.time = lambda: (counts.append(bench.launches), timing())[1]
  bench.calibrate(5e-3)
  # 5 / 1.1 -> 5 launches, 1.5 ms; 5 * 5 / 1.5 -> 17, 2.7 ms; 5 * 17 / 2.7 -> 32, 4.2 ms; 5 * 32 / 4.2 -> 39, 4.9 ms.
  assert counts[:5] == [1, 5, 17, 32, 39]
  assert bench.launches * 1e-4 + 1e-3 >= 5e-3 > (bench.launches - 2) * 1e-4 + 1e-3
  bench.calibrate(0.0)
  assert bench.launches == 1


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
  # A dropped offset; and what no entry shows, but all together do: 2 %.
  assert bench_qmatmul.deviation(x, w.replace(offset=w.offset * 0), y, direction) > 1
  assert bench_qmatmul.deviation(x, w, y * 1.02, direction) > 1
  bench.run = lambda xs, ws: [y * 0 for _ in xs]
  with pytest.raises(AssertionError, match=f'^xla, {direction} 256x128, 8 rows'):
    bench.time()


def test_crossovers_are_lines_of_a_table():
  row = lambda impl, rows, us, bits='4': {
    'shape': 'a', 'rows': rows, 'bits': bits, 'group': 32, 'direction': 'forward', 'impl': impl, 'us': us,
  }  # fmt: skip
  rows = [row('xla', n, 8.0) for n in (1, 16, 256)]
  rows += [row('triton', 1, 2.0), row('triton', 16, 4.0), row('triton', 256, 16.0)]
  rows += [row('xla', 1, 8.0, 'nf4'), row('triton', 1, 12.0, 'nf4')]
  assert list(bench_qmatmul.crossovers(rows, 'NVIDIA H100 80GB HBM3')) == [
    "'H100': 0,  # triton forward, codebook; time over xla by rows: 1: 1.50",
    "'H100': 16,  # triton forward, integer; time over xla by rows: 1: 0.25, 16: 0.50, 256: 2.00",
  ]
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
    (bench_qmatmul.main, '--groups=128', '64x128: 64 inputs do not divide into groups of 128'),
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


def test_each_method_is_stored_when_it_is_measured(tmp_path, monkeypatch):
  """And nothing of memory is compiled where it is not asked for."""

  def timed(*_):
    for method in ('a', 'b'):
      yield {'method': method}
      assert [row['method'] for row in json.loads((tmp_path / 's.json').read_text())['rows']][-1] == method

  monkeypatch.setattr(bench_step, 'timed', timed)
  monkeypatch.setattr(bench_step, 'abstract_step', None)
  bench_step.main(['--time-only', f'--out={tmp_path / "s"}'])
  content = json.loads((tmp_path / 's.json').read_text())
  assert [row['table'] for row in content['rows']] == ['time', 'time']


def test_weights_are_arguments_of_what_is_timed():
  """As constants they would be folded into the program, and dequantized while it is compiled."""
  size = bench_step.Size(1, 128, 1, 8, 1)
  model = bench_step.decoder.Decoder(
    bench_step.config(size, jnp.float32, 'none'), bench_step.schemes(2, jnp.float32)[bench_step.QALORA[4]]
  )
  variables = jax.eval_shape(lambda: bench_step.born(model))
  params, frozen = variables['params'], variables['frozen']
  tokens = bench_step.batch(1, 8, bench_step.VOCABULARY)
  for run in bench_step.passes(model).values():
    memory = run.lower(params, frozen, tokens).compile().memory_analysis()
    assert memory.argument_size_in_bytes >= quant.stored_bytes(frozen)


def test_flops_are_those_of_the_matrices_and_of_attention():
  config = decoder.Config(256, 128, 320, 3, 1, 1)
  matrices = 3 * (4 * 128 * 128 + 3 * 128 * 320) + 256 * 128
  assert bench_step.flops(config, rows=2, window=8) == 16 * (4 * matrices + 3 * 12 * 8 * 128)
  assert bench_step.config(dataclasses.replace(bench_step.SIZES['gpu'], layers=2), jnp.bfloat16, 'none') == (
    decoder.Config(256, 4096, 11008, 2, 32, 32, max_position_embeddings=512, dtype=jnp.bfloat16)
  )

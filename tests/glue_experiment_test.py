"""experiments/glue.py: a row is measured once, processes share the rows, the table says what was measured."""

import json
import pathlib
import sys

import pytest

from experiments import glue
from experiments import pipeline
from qalora_jax import config as config_lib
from qalora_jax import report


@pytest.fixture
def place(tmp_path, monkeypatch):
  """Runs and results in a directory of their own."""
  monkeypatch.setattr(glue, 'RUNS', tmp_path / 'runs')
  monkeypatch.setattr(glue, 'RESULTS', tmp_path / 'glue')
  # The script goes to the root of the repository by itself; nothing is left elsewhere for the tests that follow.
  monkeypatch.chdir(tmp_path)
  return tmp_path


def _measured(task, row, seed, data):
  del data
  return {
    'task': task, 'method': row[0], 'bits': row[1], 'seed': seed, 'accuracy': 0.5 + seed / 8, 'bytes': 10,
    'bits_per_weight': 4.5, 'trained_parameters': 7, 'seconds_per_step': 0.25, 'steps': 3,
  }  # fmt: skip


def _run(monkeypatch, *words):
  monkeypatch.setattr(sys, 'argv', ['glue', *words])
  glue.main()


@pytest.mark.parametrize('task', glue.TASKS)
def test_every_row_is_a_run_that_can_be(task):
  for row in (*glue.grid(), glue.WHOLE):
    pipeline.checked(*glue.run(task, row, seed=0, data=pathlib.Path('glue')))


def test_rows_are_measured_once_and_shared(place, monkeypatch):
  done = []

  def measure(task, row, seed, data):
    done.append((row[0], row[1], seed))
    if row[0] == 'head alone' and seed == 0:
      # Another process comes to the same list meanwhile: it does the rest, and leaves this row to the first.
      monkeypatch.setattr(glue, 'measure', lambda *known: done.append((*known[1][:2], known[2])) or _measured(*known))
      _run(monkeypatch, 'mrpc', '--seeds=2')
    return _measured(task, row, seed, data)

  monkeypatch.setattr(glue, 'measure', measure)
  _run(monkeypatch, 'mrpc', '--seeds=2')
  assert sorted(done, key=str) == sorted(((row[0], row[1], seed) for row in glue.grid() for seed in (0, 1)), key=str)
  rows = json.loads((place / 'glue.json').read_text())['rows']
  assert {row['commit'] for row in rows} == {report.commit()} and len(rows) == len(done)
  _run(monkeypatch, 'mrpc', '--seeds=2')
  assert len(done) == len(rows)


def test_a_limit_ends_before_the_next_row(place, monkeypatch):
  monkeypatch.setattr(glue, 'measure', _measured)
  _run(monkeypatch, 'sst2', '--seeds=1')
  before = (place / 'glue.json').read_text()
  _run(monkeypatch, '--limit=0')
  assert (place / 'glue.json').read_text() == before


def test_the_table_has_means_and_spreads(place, monkeypatch):
  monkeypatch.setattr(glue, 'measure', _measured)
  _run(monkeypatch, 'sst2')
  table = glue.summary(json.loads((place / 'glue.json').read_text())['rows'])
  assert [row['method'] for row in table] == [row[0] for row in (*glue.grid(), glue.WHOLE)]
  assert {row['accuracy'] for row in table[:-1]} == {'0.6250 ± 0.1250'} and table[-1]['accuracy'] == '0.5000'
  assert (place / 'glue.png').stat().st_size > 10_000 and '0.6250 ± 0.1250' in (place / 'glue.md').read_text()


def test_an_unknown_task_is_named(place, monkeypatch, capsys):
  with pytest.raises(SystemExit):
    _run(monkeypatch, 'sst3')
  assert "no task 'sst3'; there are sst2, mrpc" in capsys.readouterr().err


@pytest.mark.parametrize('task', glue.TASKS)
def test_all_of_a_task_see_the_same(task):
  recipes = [
    config_lib.recipe(f'configs/{kind}_minilm_{task}.py') for kind in ('full', 'head', 'lora', 'qlora', 'qalora')
  ]
  assert len({str(recipe.data) for recipe in recipes}) == len({str(recipe.train) for recipe in recipes}) == 1
  assert {recipe.train.batch * recipe.data.window for recipe in recipes} == {512}

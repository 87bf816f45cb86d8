"""SIGKILL at random moments loses nothing: experiments/faults.py with a few kills."""

import json
import os
import subprocess
import sys

import pytest

from experiments import faults


def test_a_run_killed_and_harmed_ends_bit_for_bit_as_one_that_was_not(tmp_path):
  """A process of its own, which forks before JAX begins."""
  words = ('--kills=4', '--damages=1', '--seed=1', f'--place={tmp_path / "runs"}', f'--out={tmp_path / "log"}')
  # Without the tests' eight devices.
  env = os.environ | {'XLA_FLAGS': ''}
  root = faults.RESULTS.parents[2]
  subprocess.run([sys.executable, '-m', 'experiments.faults', *words], check=True, cwd=root, env=env)
  said = json.loads((tmp_path / 'log.json').read_text())
  assert len(said['rows']) == said['kills'] == 4 and said['found_and_set_aside'] == said['harmed']
  assert said['lost'].startswith('nothing')


@pytest.mark.parametrize('file', ['metrics.jsonl', 'checkpoints/7/data/metadata'])
def test_what_is_lost_is_an_error(tmp_path, monkeypatch, file):
  """The comparison that the log rests on sees a step done twice and a data position that is off by one."""
  restored = {'params': [1.0], 'optimizer': [2.0]}
  monkeypatch.setattr(faults, 'arrays', lambda place: restored)
  for name in ('one', 'two'):
    (tmp_path / name / 'checkpoints/7/data').mkdir(parents=True)
    (tmp_path / name / 'checkpoints/7/data/metadata').write_text('{"next": 7}')
    (tmp_path / name / 'metrics.jsonl').write_text('{"step": 7, "loss": 2.0}\n')
  faults.compare(tmp_path / 'one', tmp_path / 'two')
  changed = tmp_path / 'one' / file
  changed.write_text(changed.read_text() * 2)
  with pytest.raises(ValueError, match='differ'):
    faults.compare(tmp_path / 'one', tmp_path / 'two')


def test_a_bit_of_a_moment_is_seen(tmp_path, monkeypatch):
  for name in ('one', 'two'):
    (tmp_path / name / 'checkpoints/7').mkdir(parents=True)
  trees = iter([{'params': [1.0]}, {'params': [1.0]}, {'mu': [2.0]}, {'mu': [2.0000002]}])
  monkeypatch.setattr(faults, 'arrays', lambda place: next(trees))
  with pytest.raises(ValueError, match=r"optimizer\['mu'\]\[0\] differs"):
    faults.compare(tmp_path / 'one', tmp_path / 'two')

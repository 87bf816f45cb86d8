"""Results as data: everything needed to run them again, written whole, and tables made from them."""

import datetime
import json
import subprocess

import pytest

from qalora_jax import report


def test_a_document_says_all_that_is_needed_to_run_it_again():
  rows = [{'model': 'a', 'loss': 1.0}]
  found = report.document('qalora evaluate', rows, seed=3)
  assert set(found) == {'command', 'commit', 'date', 'machine', 'versions', 'seed', 'rows'}
  assert (found['command'], found['seed'], found['rows']) == ('qalora evaluate', 3, rows)
  assert datetime.datetime.fromisoformat(found['date']).utcoffset() == datetime.timedelta(0)
  assert set(found['versions']) >= {'python', 'qalora_jax', 'jax', 'jaxlib', 'flax', 'optax', 'numpy'}
  assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize('heads, found', [('abc123def456', 'abc123def456'), ('', None)])
def test_a_commit_is_that_of_the_checkout_or_none(monkeypatch, heads, found):
  def git(words, **_):
    code, out = (0 if heads else 128), (heads if 'rev-parse' in words else '')
    return subprocess.CompletedProcess(words, code, stdout=out + '\n', stderr='')

  monkeypatch.setattr(subprocess, 'run', git)
  assert report.commit() == found


def test_changed_files_mark_the_commit(monkeypatch):
  out = lambda words, **_: subprocess.CompletedProcess(words, 0, 'abc\n' if 'rev-parse' in words else ' M a.py\n', '')
  monkeypatch.setattr(subprocess, 'run', out)
  assert report.commit() == 'abc+'


def test_no_git_is_no_commit(monkeypatch):
  monkeypatch.setenv('PATH', '')
  assert report.commit() is None


def test_results_are_written_whole_or_not_at_all(tmp_path):
  path = tmp_path / 'deep' / 'results.json'
  report.write(path, {'rows': [1]})
  with pytest.raises(TypeError):
    report.write(path, {'rows': [1], 'wrong': object()})
  assert json.loads(path.read_text()) == {'rows': [1]}
  assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
  'value, shown',
  [
    (None, '–'),
    (0.0, '0.0000'),
    (0.68563, '0.6856'),
    (-2.5, '-2.5000'),
    (2e-5, '2.00e-05'),
    (3.2e7, '3.20e+07'),
    (936448, '936,448'),
    ('qalora', 'qalora'),
  ],
)
def test_cells(value, shown):
  assert report.text(value) == shown


def test_tables_have_a_column_for_every_key(capsys):
  rows = [{'model': 'a', 'loss': 0.5}, {'model': 'b', 'tokens': 1200}]
  assert report.markdown(rows) == ('| model | loss | tokens |\n|---|---|---|\n| a | 0.5000 | – |\n| b | – | 1,200 |\n')
  report.show('two models', rows)
  shown = capsys.readouterr().out
  assert all(word in shown for word in ('two models', 'model', 'loss', 'tokens', '0.5000', '1,200'))


def test_a_single_row_is_shown_whole(capsys):
  report.show('one model', [{'model': 'x' * 100, 'loss': 0.5}])
  shown = capsys.readouterr().out
  assert 'x' * 100 in shown and '0.5000' in shown

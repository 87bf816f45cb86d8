"""What loading a checkpoint takes beside its result, measured in processes of their own."""

import json

import pytest

from experiments import loading
from qalora_jax.models import decoder


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
  """111 MiB, of which no tensor is more than 3."""
  directory = tmp_path_factory.mktemp('loading') / 'model'
  loading.synthesize(directory, decoder.Config(1024, 768, 2048, 8, 6, 6))
  return directory


@pytest.mark.parametrize('devices', [1, 8])
def test_memory_is_that_of_the_result_and_of_a_few_tensors(checkpoint, devices):
  """Beside the packed tree there stand, of one tensor at a time and in units of the largest as it is stored (bfloat16):

  1 as read, 1 turned over, 2 in float32, 2 of codes before they are packed, 2 of what the quantizer works on, 1 packed,
  on the host and on its way: 10.  Another copy of the packed tree would be more.
  """
  row = loading.apart(checkpoint, 4, 'streamed', devices, rounds=2)
  assert row['devices'] == devices
  assert row['packed_MiB'] > 10 * row['largest_MiB']
  # At least the result itself is there, but for pages that the first round left.
  assert 0.5 * row['packed_MiB'] < row['peak_MiB'] <= row['packed_MiB'] + 10 * row['largest_MiB']


def test_the_table_is_published(tmp_path, monkeypatch):
  monkeypatch.setattr(loading, 'DEVICES', (1,))
  loading.main(['--layers=1', '--width=128', '--vocabulary=256', f'--out={tmp_path / "found"}'])
  rows = json.loads((tmp_path / 'found.json').read_text())['rows']
  assert [row['way'] for row in rows] == ['host', 'streamed']
  assert 'experiments.loading --layers=1' in (tmp_path / 'found.md').read_text()


def test_what_fails_in_the_other_process_is_told(tmp_path):
  with pytest.raises(RuntimeError, match=r'loading streamed on 1 devices failed:\n[\s\S]*config.json'):
    loading.apart(tmp_path, 4, 'streamed', 1)

"""`qalora quantize`: a quantized directory is the model that quantizing on load gives."""

import json

import pytest
import small_llama

from qalora_jax import build
from qalora_jax import config as config_lib
from qalora_jax import packed


@pytest.fixture(scope='module')
def quantized(qalora, tmp_path_factory):
  directory = tmp_path_factory.mktemp('quantized') / 'model'
  qalora('quantize', directory)
  return directory


def rows(workdir):
  found = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  return [{name: value for name, value in row.items() if name != 'tokens_per_second'} for row in found]


def test_the_directory_is_what_quantizing_on_load_gives(quantized, recipe):
  built = build.setup(config_lib.recipe(recipe))
  small_llama.same(packed.load(quantized, built.model.config), build.load_weights(built))


def test_training_from_either_is_the_same_bit_for_bit(quantized, trained, qalora, tmp_path):
  qalora('train', tmp_path, f'model.source={quantized}', 'base.method=stored')
  assert rows(tmp_path) == rows(trained)
  assert (tmp_path / 'base.json').read_bytes() == (trained / 'base.json').read_bytes()


def test_the_manifest_says_where_it_comes_from(quantized, source):
  found = packed.manifest(quantized)['provenance']
  assert (found['source'], found['merged']) == (str(source), False)
  assert (found['base']['bits'], found['base']['group']) == (4, 16)


@pytest.mark.parametrize(
  'words, message',
  [
    (['base.method=stored'], 'leaves the weights as they are; choose "affine"'),
    (['model.source={quantized}'], 'is already quantized; start from its dense source'),
    (['model.source=scratch', 'adapter.kind=none'], 'has no weights to quantize'),
    (['model.source=/nowhere/model'], 'no directory and no hub id'),
    (['base.group=48'], '32 inputs do not divide into groups of 48'),
  ],
)
def test_what_cannot_be_quantized_is_refused(qalora, quantized, tmp_path, words, message):
  with pytest.raises((ValueError, FileNotFoundError), match=message):
    qalora('quantize', tmp_path / 'out', *(word.format(quantized=quantized) for word in words))
  assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(qalora, quantized):
  before = {path: path.read_bytes() for path in quantized.iterdir()}
  with pytest.raises(ValueError, match='exists and is not empty'):
    qalora('quantize', quantized, 'base.bits=2')
  assert {path: path.read_bytes() for path in quantized.iterdir()} == before

"""A tokenizer gives back the text it was given, whatever file it comes from."""

import json
import shutil

import pytest

from qalora_jax import tokenizer

TEXTS = ['the cat sat on the mat', 'the mat sat on the cat', 'naïve café: 100 % 漢字\n\ttab'] * 4


@pytest.fixture
def trained(tmp_path):
  tokenizer.train_bpe(TEXTS, 300, tmp_path)
  return tmp_path


def _configure(directory, **described):
  (directory / 'tokenizer_config.json').write_text(json.dumps(described))


def test_sentencepiece_round_trip(assets):
  loaded = tokenizer.load(assets / 'models' / 'babyllama_tok105')
  text = 'Once upon a time, there was a little girl named Lily.'
  ids = loaded.encode(text)
  assert loaded.decode(ids) == text
  assert (loaded.vocab_size, loaded.bos, loaded.eos) == (105, 1, 2)
  assert loaded.bos not in ids and loaded.eos not in ids
  assert loaded.encode('') == []


def test_llama_tokens_are_those_of_llama(assets):
  loaded = tokenizer.load(assets / 'models' / 'llama2_tokenizer')
  assert loaded.encode('Hello world') == [15043, 3186]
  assert (loaded.vocab_size, loaded.bos, loaded.eos) == (32000, 1, 2)


def test_bpe_loses_nothing(trained):
  loaded = tokenizer.load(trained)
  for text in [*TEXTS[:3], ' leading', 'unseen: Ωß\r\n', '']:
    assert loaded.decode(loaded.encode(text)) == text
  assert (loaded.bos, loaded.eos) == (0, 1)
  assert len(loaded.encode(TEXTS[0])) < len(TEXTS[0])
  assert loaded.decode([loaded.bos, *loaded.encode('mat'), loaded.eos]) == 'mat'


def test_bpe_depends_on_the_texts_alone(trained, tmp_path):
  tokenizer.train_bpe(iter(TEXTS), 300, tmp_path / 'again')
  for name in ('tokenizer.json', 'tokenizer_config.json'):
    assert (trained / name).read_bytes() == (tmp_path / 'again' / name).read_bytes()


def test_bpe_needs_room_for_the_bytes(tmp_path):
  with pytest.raises(ValueError, match='at least 258'):
    tokenizer.train_bpe(TEXTS, 257, tmp_path)


def test_special_tokens_may_be_objects_or_null(trained):
  _configure(trained, bos_token=None, eos_token={'content': '</s>', 'lstrip': False})
  loaded = tokenizer.load(trained)
  assert (loaded.bos, loaded.eos) == (None, 1)


@pytest.mark.parametrize(('eos', 'expected'), [(1, 1), ([1, 0], 1), (None, None)])
def test_special_tokens_of_the_model_where_the_tokenizer_is_silent(trained, eos, expected):
  (trained / 'tokenizer_config.json').unlink()
  (trained / 'config.json').write_text(json.dumps({'bos_token_id': 0, 'eos_token_id': eos}))
  loaded = tokenizer.load(trained)
  assert (loaded.bos, loaded.eos) == (0, expected)


def test_published_limits_do_not_cut_or_pad(trained):
  import tokenizers

  backend = tokenizers.Tokenizer.from_file(str(trained / 'tokenizer.json'))
  backend.enable_truncation(2)
  backend.enable_padding(length=50)
  whole = tokenizer.load(trained).encode(TEXTS[0])
  backend.save(str(trained / 'tokenizer.json'))
  assert tokenizer.load(trained).encode(TEXTS[0]) == whole


def test_copies_verbatim_what_exists(trained, tmp_path):
  (trained / 'config.json').write_text('{}')
  tokenizer.copy(trained, tmp_path / 'copy')
  copied = {path.name: path.read_bytes() for path in (tmp_path / 'copy').iterdir()}
  assert copied == {name: (trained / name).read_bytes() for name in ('tokenizer.json', 'tokenizer_config.json')}


def test_missing_files_are_named(tmp_path):
  for call in (tokenizer.load, lambda directory: tokenizer.copy(directory, tmp_path / 'copy')):
    with pytest.raises(FileNotFoundError, match=f'{tmp_path}.*tokenizer.model, tokenizer.json, spiece.model'):
      call(tmp_path)


def test_t5_calls_a_sentencepiece_model_otherwise(assets, tmp_path):
  stories = assets / 'models' / 'stories260K'
  (tmp_path / 'spiece.model').write_bytes((stories / 'tokenizer.model').read_bytes())
  tokenizer.copy(tmp_path, tmp_path / 'copy')
  ids = [tokenizer.load(place).encode('Once upon a time') for place in (stories, tmp_path, tmp_path / 'copy')]
  assert ids[0] == ids[1] == ids[2]


@pytest.mark.parametrize('name', ['tokenizer.model', 'tokenizer.json', 'spiece.model'])
def test_unreadable_files_are_named(tmp_path, name):
  (tmp_path / name).write_text('version https://git-lfs.github.com/spec/v1')
  with pytest.raises(ValueError, match=name):
    tokenizer.load(tmp_path)


def test_unknown_special_token_is_named(trained):
  _configure(trained, bos_token='<start>')
  with pytest.raises(ValueError, match='<start>'):
    tokenizer.load(trained)
  (trained / 'tokenizer_config.json').write_text('{')
  with pytest.raises(ValueError, match='tokenizer_config.json'):
    tokenizer.load(trained)


def test_tokens_that_a_directory_adds_are_marks(assets, tmp_path):
  shutil.copy(assets / 'models' / 'babyllama_tok105' / 'tokenizer.model', tmp_path)
  (tmp_path / 'added_tokens.json').write_text('{"<|im_start|>": 105}')
  described = {'106': {'content': '<|im_end|>', 'special': True}, '107': {'content': '<plain>', 'special': False}}
  stated = {'added_tokens_decoder': described, 'eos_token': '<|im_end|>'}
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps(stated))
  found = tokenizer.load(tmp_path)
  inside = found.encode('user')
  ids = tokenizer.encode_marked(found, '<|im_start|>user<|im_end|><plain>')
  assert ids == [105, *inside, 106, 107]
  assert found.eos == 106 and found.vocab_size == 105
  assert found.decode([105, *inside, 106, 107, *inside, 999]) == 'user<plain>user'

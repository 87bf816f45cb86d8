"""Windows of calibration text: every token in its place, none twice, drawn by the seed alone."""

import gzip
import json

import numpy as np
import pytest

from qalora_jax import tokenizer as tokenizer_lib
from qalora_jax.data import calibration
from qalora_jax.data import records

BOS = 256
TEXTS = ['The cat sat.', 'A naïve café.', '', 'x']


def _tokenizer(bos=BOS):
  return tokenizer_lib.Tokenizer(257, bos, None, lambda text: list(text.encode()), lambda ids: bytes(ids).decode())


def _samples(documents, *, length=8, count=4, seed=0, tokenizer=None, path='some.txt'):
  return calibration.samples(documents, tokenizer or _tokenizer(), length=length, count=count, seed=seed, path=path)


def _counting(windows, length, rest=0):
  """A document whose tokens are numbers from 0 up, so that each tells its place, and the tokenizer that reads it."""
  total = windows * length + rest
  plain = tokenizer_lib.Tokenizer(total, None, None, lambda text: [int(word) for word in text.split()], str)
  return {'documents': [records.Text(' '.join(map(str, range(total))))], 'tokenizer': plain, 'length': length}


def test_the_stream_holds_every_token_once_in_order():
  texts = [records.Text(text) for text in TEXTS]
  stream = np.concatenate([[BOS, *text.encode()] for text in TEXTS])
  # All windows of one token are the tokens, in another order; one window of all tokens is the stream.
  ones = _samples(texts, length=1, count=len(stream))
  assert sorted(ones[:, 0].tolist()) == sorted(stream.tolist())
  np.testing.assert_array_equal(_samples(texts, length=len(stream), count=1), stream[None])


@pytest.mark.parametrize('rest', [0, 1, 6])
@pytest.mark.parametrize('count', [1, 5, 12, 100])
def test_windows_are_consecutive_and_none_comes_twice(count, rest):
  found = _samples(**_counting(12, 7, rest), count=count)
  assert found.shape == (min(count, 12), 7) and found.dtype == np.int32
  starts = found[:, 0]
  np.testing.assert_array_equal(found, starts[:, None] + np.arange(7))
  assert not (starts % 7).any()
  assert len(set(starts.tolist())) == len(found)
  if count >= 12:
    assert sorted(starts.tolist()) == list(range(0, 84, 7))


def test_the_seed_alone_decides():
  settings = _counting(200, 3)
  first, same, other = (_samples(**settings, count=50, seed=seed) for seed in (7, 7, 8))
  np.testing.assert_array_equal(first, same)
  assert set(first[:, 0].tolist()) != set(other[:, 0].tolist())
  # In the order drawn, not in that of the text; and fewer are the first of more.
  assert (np.diff(first[:, 0]) < 0).any()
  np.testing.assert_array_equal(_samples(**settings, count=20, seed=7), first[:20])


def test_every_window_is_drawn_as_often_as_any_other():
  settings = _counting(10, 2)
  drawn = [_samples(**settings, count=3, seed=seed)[:, 0] // 2 for seed in range(600)]
  times = np.bincount(np.concatenate(drawn), minlength=10)
  # Each of 600 draws takes a window with probability 0.3: 180 times, standard deviation sqrt(600 * 0.3 * 0.7) = 11.
  assert np.abs(times - 180).max() < 5 * 11


PAIR = ('Question: ', 'answer')
FILES = {
  'text': ('a.txt', 'one two|three', {'format': 'text', 'separator': '|'}, ['one two', 'three']),
  'jsonl': ('a.jsonl', '{"text": "one"}\n{"text": "two"}', {}, ['one', 'two']),
  'jsonl.gz': ('a.jsonl.gz', '{"text": "one"}\n{"text": "two"}', {}, ['one', 'two']),
  'completion': ('a.jsonl', json.dumps(dict(zip(('prompt', 'completion'), PAIR, strict=True))), {}, [''.join(PAIR)]),
  'pairs': ('a.pairs', 'one || two\nthree || four', {'format': 'pairs'}, ['onetwo', 'threefour']),
  'alpaca': ('a.json', '[{"instruction": "Sing.", "output": "La"}]', {'format': 'alpaca'}, ['Sing.La']),
}


@pytest.mark.parametrize('name', FILES)
def test_every_format_gives_bos_and_text_prompts_included(tmp_path, name):
  file, contents, fields, texts = FILES[name]
  encoded = contents.encode()
  (tmp_path / file).write_bytes(gzip.compress(encoded) if file.endswith('.gz') else encoded)
  documents = records.read(records.Source(str(tmp_path / file), **fields))
  want = np.concatenate([[BOS, *text.encode()] for text in texts])
  np.testing.assert_array_equal(_samples(documents, length=len(want)), want[None])


def test_prompt_and_completion_are_tokenized_apart():
  whole = tokenizer_lib.Tokenizer(100, None, None, lambda text: [len(text)], str)
  np.testing.assert_array_equal(_samples([records.Pair('abc', 'de')], length=2, tokenizer=whole), [[3, 2]])


def test_a_real_tokenizer_reads_back_what_was_written(source):
  tokenizer = tokenizer_lib.load(source)
  texts = ['the cat sat on the mat', 'the dog sat on the roof']
  length = sum(1 + len(tokenizer.encode(text)) for text in texts)
  (window,) = calibration.samples([records.Text(text) for text in texts], tokenizer, length=length, count=1, seed=0)
  assert tokenizer.decode(window) == ''.join(texts)
  assert window.tolist().count(tokenizer.bos) == 2


@pytest.mark.parametrize('documents', [[], [records.Text('abcd')]])
def test_too_little_text_is_named_with_the_ways_out(documents):
  tokens = sum(1 + len(document.text) for document in documents)
  message = rf'some.txt: {tokens} tokens do not fill one window of 8; lower calibration.length, or name more text'
  with pytest.raises(ValueError, match=message):
    _samples(documents)


def test_what_cannot_be_is_refused():
  with pytest.raises(ValueError, match='some.txt holds choices to be scored'):
    _samples([records.Question('q', ('a', 'b'), 0)])
  for name in ('length', 'count'):
    with pytest.raises(ValueError, match=f'{name} = 0; calibration needs at least 1'):
      _samples([records.Text('a')], **{name: 0})

"""`qalora evaluate`: scores are the log-probabilities that a plain forward gives, and results.json says all."""

import json
import math
import pathlib
import types

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import numpy_llama
import pytest

from qalora_jax import build
from qalora_jax import config as config_lib
from qalora_jax import sharding
from qalora_jax import tokenizer as tokenizer_lib
from qalora_jax.data import records
from qalora_jax.evaluate import choices
from qalora_jax.evaluate import perplexity

# p(next | token) of a language of four letters; BOS is 0.
BIGRAM = np.array([[0.0, 0.5, 0.25, 0.25], [0.0, 0.5, 0.25, 0.25], [0.0, 0.125, 0.75, 0.125], [0.0, 0.25, 0.25, 0.5]])
QUESTIONS = [
  {'prompt': 'the cat sat on', 'choices': [' the mat', ' the naïve moon today', ' a'], 'answer': 0},
  {'prompt': 'the dog', 'choices': [' sat', ' again'], 'answer': 'B'},
  {'prompt': 'the bird sat on the sea', 'choices': [' at night', ' today', ' the café', ' mat'], 'answer': 2},
  {'question': 'the', 'choices': [' cat', ' dog'], 'answer': 1},
]
STORED = ('base.method=stored', 'adapter.kind=none')


class Bigram(nn.Module):
  config = types.SimpleNamespace(vocab_size=4)

  def __call__(self, tokens_BT, segments_BT=None, positions_BT=None, only_BP=None):
    x_BTV = self.hidden(tokens_BT)
    return self.head(x_BTV if only_BP is None else jnp.take_along_axis(x_BTV, only_BP[:, :, None], axis=1))

  def hidden(self, tokens_BT, segments_BT=None, positions_BT=None):
    return jax.nn.one_hot(tokens_BT, len(BIGRAM))

  def head(self, x_BPV):
    return x_BPV @ jnp.log(jnp.asarray(BIGRAM) + 1e-30)


def letters():
  return tokenizer_lib.Tokenizer(4, 0, None, lambda text: ['_abc'.index(c) for c in text], lambda ids: 'x' * len(ids))


def example(tokens, given=1):
  tokens = np.array(tokens, np.int32)
  return {'tokens': tokens, 'loss_mask': (np.arange(len(tokens)) >= given).astype(np.int32)}


def summed_log_p(source, tokens, given):
  """log p of tokens[given:] after tokens[:given], in float64 by numpy_llama, one text at a time and without padding."""
  logits = numpy_llama.logits(source, [tokens])[0]
  log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  return sum(log_p[t - 1, tokens[t]] for t in range(given, len(tokens)))


@pytest.fixture
def one_device():
  return sharding.make_mesh(devices=jax.devices()[:1])


@pytest.fixture
def questions(tmp_path):
  path = tmp_path / 'questions.jsonl'
  path.write_text('\n'.join(json.dumps(question) for question in QUESTIONS))
  return path


@pytest.mark.parametrize('batch', [1, 2, 5])
def test_perplexity_by_hand(one_device, batch):
  """Targets a b | c c | (given b) b: 1/2 1/4 | 1/4 1/2 | 3/4, whatever stands in one batch."""
  scored = [example([0, 1, 2]), example([0, 3, 3]), example([0, 2, 2], given=2)]
  got = perplexity.score(Bigram(), {}, examples=scored, window=8, batch=batch, mesh=one_device, characters=10)
  nats = 2 * math.log(2) + 2 * math.log(4) + math.log(4 / 3)
  assert got['tokens'] == 5
  assert got['nats_per_token'] == pytest.approx(nats / 5, rel=1e-6)
  assert got['perplexity'] == pytest.approx(math.exp(nats / 5), rel=1e-6)
  assert got['bits_per_character'] == pytest.approx(nats / math.log(2) / 10, rel=1e-6)


def test_accuracy_by_hand(one_device):
  asked = [
    records.Question('a', ('a', 'bb', 'c'), 0),  # 1/2, 3/16, 1/4; right by both rules
    records.Question('a', ('b', 'bbb'), 1),  # 1/4, 9/64; their roots 1/4, 0.52: right per character
    records.Question('c', ('ab', 'c'), 0),  # 1/16, 1/2; their roots 1/4, 1/2: wrong
    records.Question('b', ('ccccc', 'bbbbb'), 1),  # 1/2048, 243/1024; right
  ]
  got = choices.accuracy(Bigram(), {}, letters(), asked, window=8, batch=2, mesh=one_device)
  assert (got['accuracy'], got['accuracy_norm']) == (0.5, 0.75)
  assert got['standard_error'] == pytest.approx(0.25)
  assert got['chance'] == pytest.approx((1 / 3 + 1 / 2 + 1 / 2 + 1 / 2) / 4)
  assert got['questions'] == 4


def bigram_nats(stream, targets):
  return -sum(math.log(BIGRAM[stream[t - 1], stream[t]]) for t in targets)


STREAM = 'abccbbabcab'  # with BOS 12 tokens


@pytest.mark.parametrize(
  'window, stride, first, targets',
  [
    (5, 0, 0, [1, 2, 3, 4, 6, 7, 8, 9]),  # two windows; the remainder of two tokens is left out
    (5, 5, 0, [1, 2, 3, 4, 6, 7, 8, 9]),
    (4, 0, 2, [1, 2, 3, 5, 6, 7]),
    (12, 0, 0, range(1, 12)),
    (5, 2, 0, range(1, 12)),
    (5, 4, 0, range(1, 12)),
    (5, 1, 0, range(1, 12)),
    (5, 3, 2, range(1, 10)),
    (20, 3, 0, range(1, 12)),  # one window holds all
  ],
)
def test_windows_by_hand(one_device, window, stride, first, targets):
  """The Bigram looks one token back, so that a score depends only on which tokens are targets."""
  stream = [0, *letters().encode(STREAM)]
  scored = perplexity.windows(letters(), STREAM, window=window, stride=stride, first=first)
  got = perplexity.score(Bigram(), {}, examples=scored, window=window, batch=3, mesh=one_device)
  nats = bigram_nats(stream, targets) / len(targets)
  assert got['tokens'] == len(targets)
  assert got['nats_per_token'] == pytest.approx(nats, rel=1e-6)
  assert got['perplexity'] == pytest.approx(math.exp(nats), rel=1e-6)


@pytest.mark.parametrize('window, stride', [(6, 1), (6, 4), (7, 3), (9, 8)])
def test_overlapping_windows_score_every_token_once_after_enough_others(window, stride):
  stream = np.arange(40)
  seen = {}
  for example in perplexity._windows(stream, window, stride):
    tokens = example['tokens']
    assert len(tokens) == len(example['loss_mask']) <= window
    for place in np.flatnonzero(example['loss_mask']):
      assert int(tokens[place]) not in seen
      seen[int(tokens[place])] = int(tokens[0])
  # b(i) of the equation, counted from 0.
  assert seen == {i: stride * math.ceil(max(i + 1 - window, 0) / stride) for i in range(1, 40)}
  assert all(i - begin >= min(i, window - stride) for i, begin in seen.items())


def test_stride_1_scores_token_by_token(text, source):
  """Every token after the `window - 1` before it, by a model that looks at all of them."""
  config = config_lib.default().copy_and_resolve_references()
  config.base.method, config.adapter.kind = 'stored', 'none'
  loaded = build.open_model(config, None, str(source))
  told = ' '.join(text.read_text(encoding='utf-8').splitlines()[:3])
  stream = [loaded.tokenizer.bos, *loaded.tokenizer.encode(told)]
  pieces = [stream[max(i - 7, 0) : i + 1] for i in range(1, len(stream))]
  nats = -sum(summed_log_p(source, piece, len(piece) - 1) for piece in pieces) / len(pieces)
  settings = dict(window=8, batch=16, mesh=build.make_mesh(config))
  scored = perplexity.windows(loaded.tokenizer, told, window=8, stride=1)
  got = perplexity.score(loaded.model, loaded.variables, examples=scored, **settings)
  assert got['tokens'] == len(pieces)
  # As in the test of a plain forward.
  assert got['nats_per_token'] == pytest.approx(nats, rel=2e-6)


@pytest.mark.parametrize(
  'settings, message',
  [
    (dict(window=1), 'window = 1 holds no target'),
    (dict(stride=6), 'evaluate.stride = 6 with windows of 5'),
    (dict(stride=-1), 'evaluate.stride = -1'),
    (dict(first=-1), 'first = -1'),
    (dict(window=13), 'has 12 tokens and needs 13; lower data.window, or name more text'),
  ],
)
def test_windows_that_cannot_be_are_refused(settings, message):
  with pytest.raises(ValueError, match=message):
    perplexity.windows(letters(), STREAM, **dict(window=5, stride=0) | settings)


def test_an_empty_text_has_no_perplexity():
  with pytest.raises(ValueError, match='has 1 tokens'):
    perplexity.windows(letters(), '', window=5, stride=2)


@pytest.mark.parametrize(
  'words, message',
  [
    (['data.window=65'], r'data.window = 65, and the model has a window of 64 .*: set data.window=64'),
    (['evaluate.stride=33', 'evaluate.tasks=wikitext2'], 'wikitext2: evaluate.stride = 33 with windows of 32'),
    (['evaluate.tasks=wikitext2'], r'wikitext2: the text has \d tokens and needs 32'),
    (['evaluate.tasks=wikitext2', 'evaluate.text.path=', 'data.window=65'], 'data.window = 65'),
  ],
)
def test_what_cannot_be_scored_is_said_before_anything_is(source, qalora, tmp_path, words, message, monkeypatch):
  monkeypatch.setattr(perplexity, 'score', lambda *_, **__: pytest.fail('something is scored'))
  (tmp_path / 'wikitext-2').mkdir()
  (tmp_path / 'wikitext-2' / 'test.txt').write_text('the cat\n')
  with pytest.raises(ValueError, match=message):
    qalora('evaluate', tmp_path / 'run', f'--model={source}', f'evaluate.data={tmp_path}', *STORED, *words)


def test_perplexity_is_that_of_a_plain_forward(text, source, qalora, tmp_path):
  lines, tokenizer = text.read_text(encoding='utf-8').splitlines()[-8:], tokenizer_lib.load(source)
  tokens = [[tokenizer.bos, *tokenizer.encode(line), tokenizer.eos] for line in lines]
  nats, count = -sum(summed_log_p(source, one, 1) for one in tokens), sum(len(one) - 1 for one in tokens)
  # A batch of 12 does not divide over eight devices; it is filled up, and the filling does not count.
  row = qalora('evaluate', tmp_path, f'--model={source}', 'evaluate.batch=12', *STORED)[0]
  assert row['tokens'] == count
  # A mean of float32 logits, each some ten units of 2^-23 off, at random.
  assert row['nats_per_token'] == pytest.approx(nats / count, rel=2e-6)
  assert row['bits_per_character'] == pytest.approx(nats / math.log(2) / sum(map(len, lines)), rel=2e-6)
  assert row['bits_per_weight'] == 32


def test_choices_are_those_of_summed_log_probabilities(questions, source, qalora, tmp_path):
  right, right_norm, tokenizer = [], [], tokenizer_lib.load(source)
  for question in QUESTIONS:
    given = [tokenizer.bos, *tokenizer.encode(question.get('prompt') or question['question'])]
    ways = question['choices']
    log_p = [summed_log_p(source, given + tokenizer.encode(way), len(given)) for way in ways]
    answer = {'B': 1}.get(question['answer'], question['answer'])
    right.append(np.argmax(log_p) == answer)
    right_norm.append(np.argmax([p / len(way) for p, way in zip(log_p, ways, strict=True)]) == answer)
  row = qalora('evaluate', tmp_path, f'--model={source}', f'evaluate.choices.path={questions}', *STORED)[0]
  assert (row['accuracy'], row['accuracy_norm']) == (np.mean(right), np.mean(right_norm))
  assert row['chance'] == pytest.approx((1 / 3 + 1 / 2 + 1 / 4 + 1 / 2) / 4)


def test_results_say_where_they_come_from(trained, recipe, qalora, tmp_path):
  rows = qalora('evaluate', tmp_path, f'--model={trained}', '--name=tiny', 'seed=3')
  found = json.loads((tmp_path / 'results.json').read_text())
  assert set(found) == {'command', 'commit', 'date', 'machine', 'versions', 'seed', 'config', 'origin', 'rows'}
  assert found['command'].startswith(f'qalora evaluate --config={recipe} --workdir=')
  assert found['rows'] == rows and rows[0]['model'] == 'tiny'
  assert (found['seed'], found['config']['seed']) == (3, 3)
  assert (found['origin']['workdir'], found['origin']['step']) == (str(trained), 8)
  assert {'python', 'qalora_jax', 'jax', 'flax'} <= set(found['versions'])


def test_a_run_scores_what_its_training_measured(trained, qalora):
  metrics = [json.loads(line) for line in (trained / 'metrics.jsonl').read_text().splitlines()]
  row = qalora('evaluate', trained)[0]
  assert row['nats_per_token'] == metrics[-1]['validation_loss']
  # 4 bits, a scale and an offset of 32 bits for 16 weights, and an adapter of 2,176 numbers for 18,432 weights.
  assert row['bits_per_weight'] == pytest.approx(4 + 64 / 16 + 32 * 2176 / 18432)


@pytest.mark.parametrize('word', ['adapter.alpha=4', 'adapter.pool=mean', 'base.bits=3'])
def test_a_run_is_not_scored_as_what_it_is_not(trained, qalora, word):
  """Weights trained with one alpha mean something else with another; nothing in their shapes would tell."""
  with pytest.raises(ValueError, match=word.partition('=')[0]):
    qalora('evaluate', trained, word)


@pytest.mark.parametrize(
  'words, message',
  [
    (['evaluate.text.path='], 'nothing to score: set evaluate.text.path, evaluate.choices.path or'),
    (['evaluate.choices.path={text}', 'evaluate.choices.format=text'], 'needs records with prompt, choices and answer'),
    (['evaluate.text.path=/nowhere.txt'], 'is not a file'),
    (['model.source='], 'there is no model to work on'),
  ],
)
def test_what_cannot_be_scored_is_refused(qalora, text, tmp_path, words, message):
  with pytest.raises((ValueError, FileNotFoundError), match=message):
    qalora('evaluate', tmp_path / 'workdir', *(word.format(text=text) for word in words))
  assert not pathlib.Path(tmp_path / 'workdir').exists()

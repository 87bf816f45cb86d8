"""`qalora generate`: greedy is the argmax, cuts cut, one program serves all tokens, and text stops where it should."""

import types

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qalora_jax import build
from qalora_jax import config as config_lib
from qalora_jax import generate
from qalora_jax import tokenizer as tokenizer_lib

WINDOW, EOS = 16, 257
LOGITS = jnp.array([0.5, 2.0, -1.0, 1.5, 0.0])


class Chain(nn.Module):
  """After token t comes token NEXT[t], surely."""

  following: tuple[int, ...]
  config = types.SimpleNamespace(max_position_embeddings=WINDOW)

  def __call__(self, tokens_BT):
    return 10.0 * jax.nn.one_hot(jnp.asarray(self.following)[tokens_BT], len(self.following))


class Counting:
  """A model that counts how often it is traced."""

  def __init__(self, model):
    self.config, self.traces, self._model = model.config, 0, model

  def apply(self, *arguments):
    self.traces += 1
    return self._model.apply(*arguments)


def chain(*tokens):
  """tokens[0] -> tokens[1] -> ... -> EOS -> tokens[0]; every other token goes to EOS."""
  following = [EOS] * 258
  for before, after in zip((EOS, *tokens), (*tokens, EOS), strict=True):
    following[before] = after
  return Chain(tuple(following))


def written(model, tokens, variables=None, seed=0, **settings):
  return list(generate.stream(model, variables or {}, tokens, key=jax.random.key(seed), **settings))


def draws(count=4000, **settings):
  settings = {'temperature': 1.0, 'top_k': 0, 'top_p': 1.0} | settings
  keys = jax.random.split(jax.random.key(0), count)
  return np.asarray(jax.vmap(lambda key: generate.sample(LOGITS, key, **settings))(keys))


@pytest.fixture(scope='module')
def loaded(recipe, source):
  return build.load_model(config_lib.recipe(recipe), str(source))


def test_greedy_is_the_argmax_of_the_full_forward_at_every_step(loaded):
  prompt = loaded.tokenizer.encode('the cat sat')
  got = written(loaded.model, prompt, loaded.variables, max_tokens=12)
  # Logits do not depend on later tokens, so one pass over the whole text holds every step.
  logits = loaded.model.apply(loaded.variables, jnp.array([prompt + got]))[0]
  assert got == np.argmax(logits, -1)[len(prompt) - 1 : -1].tolist()
  assert len(got) == 12 and len(set(got)) > 1


def test_many_tokens_are_one_program():
  model = Counting(chain(*range(14)))
  assert written(model, [0], max_tokens=10) == list(range(1, 11))
  assert model.traces == 1


def test_text_ends_at_the_window():
  assert written(chain(*range(20)), [0, 1, 2], max_tokens=100) == list(range(3, WINDOW))


def test_a_prompt_that_fills_the_window_is_refused(loaded, qalora, tmp_path):
  with pytest.raises(ValueError, match='the prompt has 16 tokens and the model a window of 16'):
    written(chain(0), [0] * WINDOW, max_tokens=1)
  with pytest.raises(ValueError, match='a window of 64; shorten the prompt'):
    qalora('generate', tmp_path, '--prompt=' + 'zq' * 64)


def test_nothing_but_the_likeliest_is_greedy():
  greedy = int(jnp.argmax(LOGITS))
  for settings in ({'top_k': 1}, {'top_p': 1e-6}, {'temperature': 0.0}, {'temperature': 1e-4}):
    assert set(draws(100, **settings)) == {greedy}


@pytest.mark.parametrize(
  'settings, kept',
  [
    ({}, [0, 1, 2, 3, 4]),
    ({'top_k': 3}, [0, 1, 3]),
    ({'top_k': 9}, [0, 1, 2, 3, 4]),
    # The probabilities are 0.496, 0.301, 0.111 and less: two hold 0.797, three 0.908.
    ({'top_p': 0.75}, [1, 3]),
    ({'top_p': 0.85}, [0, 1, 3]),
    ({'top_k': 3, 'temperature': 2.0}, [0, 1, 3]),
    # Of the three that top_k leaves, the first holds 0.547.
    ({'top_k': 3, 'top_p': 0.5}, [1]),
  ],
)
def test_draws_have_the_probabilities_of_what_the_cuts_leave(settings, kept):
  drawn = draws(**settings)
  p = np.exp(np.array(LOGITS, np.float64)[kept] / settings.get('temperature', 1.0))
  p /= p.sum()
  found = np.array([np.mean(drawn == token) for token in kept])
  assert set(drawn) == set(kept)
  # Four standard errors of a share of len(drawn) draws.
  assert (np.abs(found - p) <= 4 * np.sqrt(p * (1 - p) / len(drawn))).all()


def test_draws_depend_on_the_seed_alone(source, qalora, tmp_path):
  def text(seed):
    words = (f'seed={seed}', 'generate.temperature=1.5', 'generate.max_tokens=12', 'base.method=stored')
    return qalora('generate', tmp_path, '--prompt=the cat', *words)

  assert text(1) == text(1)
  assert text(1) != text(2)


@pytest.fixture
def spoken(monkeypatch, recipe):
  """What the command says and returns with a model that continues the prompt 'a' with `text` and EOS."""

  def say(text, capsys, *words):
    ids = [*b'a', *text.encode()]
    tokenizer = tokenizer_lib.Tokenizer(
      258, None, EOS, lambda s: list(s.encode()), lambda ids: bytes(ids).decode(errors='replace')
    )
    loaded = build.Loaded(chain(*ids), {}, tokenizer, None, {})
    monkeypatch.setattr(build, 'open_model', lambda *_: loaded)
    returned = generate.main([f'--config={recipe}', '--prompt=a', *words])
    return returned, capsys.readouterr().out

  return say


def test_text_ends_at_eos(spoken, capsys):
  assert spoken(' bcd', capsys) == (' bcd', 'a bcd\n')


def test_letters_of_several_bytes_are_shown_whole(spoken, capsys):
  assert spoken(' né€d', capsys) == (' né€d', 'a né€d\n')


def test_no_more_than_max_tokens(spoken, capsys):
  assert spoken(' bcd', capsys, '--config.generate.max_tokens=2') == (' b', 'a b\n')

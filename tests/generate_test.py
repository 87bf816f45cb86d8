"""`qalora generate`: the cache changes nothing, cuts cut, two programs serve all tokens, text stops where it should."""

import dataclasses
import io
import json
import types

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qalora_jax import build
from qalora_jax import config as config_lib
from qalora_jax import sharding
from qalora_jax import tokenizer as tokenizer_lib
from qalora_jax.generate import cache
from qalora_jax.generate import chat
from qalora_jax.generate import command
from qalora_jax.generate import decode
from qalora_jax.generate import sampling
from qalora_jax.generate import text as text_lib
from qalora_jax.models import attention
from qalora_jax.models import decoder
from qalora_jax.models import linear

WINDOW, EOS = 16, 257
LOGITS = jnp.array([0.5, 2.0, -1.0, 1.5, 0.0])


class Chain(nn.Module):
  """After token t comes token following[t], surely."""

  following: tuple[int, ...]
  scheme: linear.Scheme = linear.Scheme()
  config = types.SimpleNamespace(max_position_embeddings=WINDOW, vocab_size=258, depths={'layers': 1}, family='llama')

  def __call__(self, tokens_BT, segments_BT=None, positions_BT=None, only_BP=None):
    logits = 10.0 * jax.nn.one_hot(jnp.asarray(self.following)[tokens_BT], len(self.following))
    return jnp.take_along_axis(logits, only_BP[:, :, None], axis=1)


class Counting:
  """A model that counts how often it is traced."""

  def __init__(self, model):
    self.config, self.traces, self._model = model.config, 0, model

  def apply(self, *arguments, **choices):
    self.traces += 1
    return self._model.apply(*arguments, **choices)


def chain(*tokens):
  """tokens[0] -> tokens[1] -> ... -> EOS -> tokens[0]; every other token goes to EOS."""
  following = [EOS] * 258
  for before, after in zip((EOS, *tokens), (*tokens, EOS), strict=True):
    following[before] = after
  return Chain(tuple(following))


def written(model, prompts, variables=None, seed=0, ends=(), max_tokens=12, **settings):
  """What `stream` writes after each prompt."""
  key, settings = jax.random.key(seed), sampling.Sampling(**settings)
  stream = decode.stream(model, variables or {}, prompts, key=key, settings=settings, ends=ends, max_tokens=max_tokens)
  return [[token for token in row if token is not None] for row in zip(*stream, strict=True)]


def draws(count=4000, seen=None, **settings):
  settings = sampling.Sampling(**{'temperature': 1.0} | settings)
  keys = jax.random.split(jax.random.key(0), count)
  return np.asarray(jax.vmap(lambda key: sampling.sample(LOGITS, key, settings, seen))(keys))


@pytest.fixture(scope='module')
def loaded(recipe, source):
  return build.load_model(config_lib.recipe(recipe), str(source))


@pytest.fixture(scope='module')
def models(recipe, loaded):
  """Models of one source: dense; in 3 bits with an adapter that matters; in two stacks."""
  found = {'dense': (loaded.model, loaded.variables)}
  for name, changes in (('adapted', {'base.bits': 3}), ('stacks', {'base.rules': 'layers/1/: bits=2'})):
    config = config_lib.recipe(recipe)
    config.update_from_flattened_dict(changes)
    built = build.setup(config)
    variables = build.variables(built, sharding.make_mesh(devices=jax.devices()[:1]), seed=0)
    draw = lambda leaf: leaf + 0.05 * jax.random.normal(jax.random.key(leaf.size), leaf.shape)
    found[name] = built.model, {**variables, 'params': jax.tree.map(draw, variables['params'])}
  return found


@pytest.mark.parametrize('name', ['dense', 'adapted', 'stacks'])
def test_logits_with_a_past_are_those_of_the_whole_text(models, name):
  """Whatever the split: prompts of unequal length, padded; then one token at a time."""
  model, variables = models[name]
  config = model.config
  tokens = jax.random.randint(jax.random.key(1), (2, 24), 0, config.vocab_size)
  whole = model.apply(variables, tokens)
  lengths, size = np.array([20, 9]), 32
  padded = np.where(np.arange(20)[None] < lengths[:, None], tokens[:, :20], 7)
  first, made = model.apply(variables, padded, only_BP=lengths[:, None] - 1, mutable=[attention.PRESENT])
  grow = lambda leaf: jnp.pad(leaf, [(0, 0), (0, 0), (0, 0), (0, size - leaf.shape[3]), (0, 0)])
  past = jax.tree.map(grow, made[attention.PRESENT])
  found = [first[:, 0]]
  for step in range(4):
    at, rows = jnp.array(lengths + step), jnp.arange(2)
    logits, made = model.apply(
      {**variables, attention.PAST: past},
      tokens[rows, at][:, None],
      positions_BT=at[:, None],
      mutable=[attention.PRESENT],
    )
    put = lambda old, new, at=at, rows=rows: old.at[:, rows, :, at].set(new[:, :, :, 0].swapaxes(0, 1))
    past = jax.tree.map(put, past, made[attention.PRESENT])
    found.append(logits[:, 0])
  wanted = jnp.stack([whole[jnp.arange(2), lengths - 1 + step] for step in range(5)])
  # Two orders of the same sums: of I products in each of the matrices on a path through the model.
  scale = float(jnp.abs(whole).max())
  steps = 7 * config.num_hidden_layers * config.intermediate_size**0.5
  np.testing.assert_allclose(jnp.stack(found), wanted, rtol=0, atol=scale * steps * np.finfo(np.float32).eps)


@pytest.mark.parametrize('name', ['dense', 'adapted', 'stacks'])
def test_greedy_is_the_argmax_of_the_full_forward_at_every_step(models, loaded, name):
  model, variables = models[name]
  prompt = loaded.tokenizer.encode('the cat sat')
  (got,) = written(model, [prompt], variables)
  # Logits do not depend on later tokens, so one pass over the whole text holds every step.
  logits = model.apply(variables, jnp.array([prompt + got]))[0]
  assert got == np.argmax(logits, -1)[len(prompt) - 1 : -1].tolist()
  assert len(got) == 12 and len(set(got)) > 1


@pytest.mark.parametrize('settings', [{}, {'penalty': 1.5}, {'temperature': 1.0, 'top_p': 0.9, 'penalty': 1.2}])
def test_a_row_says_what_it_says_beside_others(models, loaded, settings):
  model, variables = models['adapted']
  prompts = [loaded.tokenizer.encode(text) for text in ('the cat sat', 'the', 'a bird on the roof sat at night again')]
  alone = [written(model, [*prompts[:1] * row, prompts[row]], variables, **settings)[row] for row in range(3)]
  assert written(model, prompts, variables, **settings) == alone


def test_reading_and_writing_are_one_program_each():
  model = Counting(chain(*range(14)))
  assert written(model, [[0]], max_tokens=10) == [list(range(1, 11))]
  assert written(model, [[3]], max_tokens=9) == [list(range(4, 13))]
  assert model.traces == 2


def test_rows_end_by_themselves():
  model = chain(*range(12))
  got = written(model, [[0], [8, 9], [10]], ends=(EOS,), max_tokens=5)
  assert got == [[1, 2, 3, 4, 5], [10, 11, EOS], [11, EOS]]


def test_text_ends_at_the_window():
  got = written(chain(*range(20)), [[0, 1, 2], [0]], max_tokens=100)
  assert got == [list(range(3, WINDOW)), list(range(1, WINDOW))]


@pytest.mark.parametrize(
  'prompt, message',
  [([0] * WINDOW, 'the prompt has 16 tokens.*window of 16'), ([], 'no token'), ([258], 'token 258 .* embeds 258')],
)
def test_a_prompt_that_leaves_nothing_to_do_is_refused(prompt, message):
  with pytest.raises(ValueError, match=message):
    written(chain(0), [[0], prompt])


def test_a_prompt_that_fills_the_window_is_refused(qalora, tmp_path):
  with pytest.raises(ValueError, match='a window of 64; shorten the prompt'):
    qalora('generate', tmp_path, '--prompt=' + 'zq' * 64)


def test_the_cache_is_written_in_place(models):
  """What decoding holds beside its arguments does not grow with the layers: the cache is nowhere copied whole."""
  config, rows, size = models['dense'][0].config, 4, 16384

  def compiled(layers):
    model = decoder.Decoder(dataclasses.replace(config, num_hidden_layers=layers))
    made = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
    leaf = jax.ShapeDtypeStruct((layers, rows, config.num_key_value_heads, size, config.head_dim), jnp.float32)
    count = jax.ShapeDtypeStruct((rows,), jnp.int32)
    held = cache.Cache({'layers': {'attention': {'k': leaf, 'v': leaf}}}, {}, count)
    state = {'cache': held, 'tokens': count, 'seen': jax.ShapeDtypeStruct((rows, 0), bool)}
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))
    lowered = decode._write.lower(model, sampling.Sampling(), None, nn.unbox(made), state, keys)
    return lowered.compile().memory_analysis(), 2 * leaf.size * 4

  (few, small), (many, large) = compiled(2), compiled(8)
  assert many.alias_size_in_bytes >= large
  assert many.temp_size_in_bytes - few.temp_size_in_bytes < 0.01 * (large - small)


def test_nothing_but_the_likeliest_is_greedy():
  greedy = int(jnp.argmax(LOGITS))
  for settings in ({'top_k': 1}, {'top_p': 1e-6}, {'min_p': 1.0}, {'temperature': 0.0}, {'temperature': 1e-4}):
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
    # 0.301 / 0.496 = 0.607, 0.111 / 0.496 = 0.223.
    ({'min_p': 0.6}, [1, 3]),
    ({'min_p': 0.2}, [0, 1, 3]),
    ({'min_p': 0.2, 'top_k': 2}, [1, 3]),
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


def test_a_penalty_moves_what_the_text_holds():
  seen = jnp.array([False, True, True, False, False])
  # Its 2 becomes 1, below the 1.5 of another; its -1 becomes -2.
  assert set(draws(10, seen, temperature=0.0, penalty=2.0)) == {3}
  drawn = draws(4000, seen, penalty=2.0)
  p = np.exp(np.array([0.5, 1.0, -2.0, 1.5, 0.0]))
  p /= p.sum()
  found = np.bincount(drawn, minlength=5) / len(drawn)
  assert (np.abs(found - p) <= 4 * np.sqrt(p * (1 - p) / len(drawn))).all()


def test_draws_depend_on_the_seed_alone(source, qalora, tmp_path):
  def text(seed):
    words = (f'seed={seed}', 'generate.temperature=1.5', 'generate.max_tokens=12', 'base.method=stored')
    return qalora('generate', tmp_path, '--prompt=the cat', *words)

  assert text(1) == text(1)
  assert text(1) != text(2)


BYTES = tokenizer_lib.Tokenizer(
  258, None, EOS, lambda s: list(s.encode()), lambda ids: bytes(ids).decode(errors='replace')
)


def told(text, stops=(), prompt='a'):
  """(pieces that were shown, the text) of a text that comes byte by byte."""
  shown, made = [], text_lib.Text(BYTES, list(prompt.encode()), stops)
  for token in text.encode():
    shown.append(made.add(token))
    if made.over:
      break
  shown.append(made.finish())
  assert ''.join(shown) == made.written
  return [piece for piece in shown if piece], made.written


@pytest.mark.parametrize(
  'stops, text, shown, all_of_it',
  [
    ((), 'a né€d', ['a', ' ', 'n', 'é', '€', 'd'], 'a né€d'),
    (('c',), 'abcd', ['a', 'b'], 'ab'),
    # What may begin a stop string waits until it is clear that it does not.
    (('bcx',), 'abcd', ['a', 'bcd'], 'abcd'),
    (('bcd',), 'abc', ['a', 'bc'], 'abc'),
    (('aab',), 'aaab', ['a'], 'a'),
    (('xx', '\n\n'), 'a\nb\n\nc', ['a', '\nb'], 'a\nb'),
    (('€',), 'n€d', ['n'], 'n'),
  ],
)
def test_text_is_shown_in_whole_letters_and_up_to_a_stop_string(stops, text, shown, all_of_it):
  assert told(text, stops) == (shown, all_of_it)


def test_a_stop_string_that_the_end_completes_is_not_shown():
  made = text_lib.Text(BYTES, [97], ('b\ufffd',))
  assert ''.join(map(made.add, (*b'ab', 0xC3))) + made.finish() == 'a'
  assert (made.written, made.over) == ('a', True)


def test_bytes_that_are_no_letter_do_not_hold_the_text_back():
  made = text_lib.Text(BYTES, [97])
  shown = ''.join(made.add(token) for token in [0xFF, 0xFE, 0xFF, 0xFE, *b'abc']) + made.finish()
  assert shown.endswith('abc')


@pytest.mark.parametrize('prompt', ['the cat', 'the dog sat on the naïve'])
def test_a_tokenizers_text_comes_as_it_is_decoded_whole(loaded, prompt):
  ids = loaded.tokenizer.encode('the café sat on the naïve moon with a friend')
  before = loaded.tokenizer.encode(prompt)
  made = text_lib.Text(loaded.tokenizer, before)
  shown = ''.join(map(made.add, ids)) + made.finish()
  assert shown == loaded.tokenizer.decode(before + ids)[len(loaded.tokenizer.decode(before)) :]


def test_a_sentencepiece_text_comes_as_it_is_decoded_whole(assets):
  tokenizer = tokenizer_lib.load(assets / 'models' / 'babyllama_tok105')
  before, ids = tokenizer.encode('Once upon'), tokenizer.encode('a time, there was\n a  small café')
  made = text_lib.Text(tokenizer, before)
  shown = ''.join(map(made.add, ids)) + made.finish()
  assert shown == tokenizer.decode(before + ids)[len(tokenizer.decode(before)) :]


@pytest.fixture
def spoken(monkeypatch, recipe, tmp_path):
  """What the command returns and says with a model that continues the prompt 'a' with `text` and EOS."""

  def say(text, capsys, *words):
    loaded = build.Loaded(chain(*b'a', *text.encode()), {}, BYTES, tmp_path, {})
    monkeypatch.setattr(build, 'open_model', lambda *_: loaded)
    returned = command.main([f'--config={recipe}', *words])
    return returned, capsys.readouterr().out

  return say


def test_text_ends_at_eos(spoken, capsys):
  assert spoken(' bcd', capsys, '--prompt=a') == (' bcd', 'a bcd\n')


def test_letters_of_several_bytes_are_shown_whole(spoken, capsys):
  assert spoken(' né€d', capsys, '--prompt=a') == (' né€d', 'a né€d\n')


def test_no_more_than_max_tokens(spoken, capsys):
  assert spoken(' bcd', capsys, '--prompt=a', '--config.generate.max_tokens=2') == (' b', 'a b\n')


def test_text_ends_before_a_stop_string(spoken, capsys):
  assert spoken(' bcd', capsys, '--prompt=a', '--config.generate.stop=["x", "cd"]') == (' b', 'a b\n')


def test_many_prompts_are_written_in_order(models, loaded, qalora, tmp_path):
  asked = [{'prompt': text, 'n': n} for n, text in enumerate(('the cat', 'a bird sat on', 'the', 'the dog', 'at'))]
  (tmp_path / 'asked.jsonl').write_text('\n'.join(map(json.dumps, asked)))
  words = ('base.method=stored', 'generate.batch=2', 'generate.max_tokens=6', f'--output={tmp_path / "said.jsonl"}')
  made = qalora('generate', tmp_path, f'--prompts={tmp_path / "asked.jsonl"}', *words)
  assert made == [json.loads(line) for line in (tmp_path / 'said.jsonl').read_text().splitlines()]
  for record, before in zip(made, asked, strict=True):
    alone = qalora('generate', tmp_path, f'--prompt={before["prompt"]}', 'base.method=stored', 'generate.max_tokens=6')
    assert record == {**before, 'text': alone}


def test_a_prompt_that_is_too_long_is_named_before_the_first_is_written(qalora, tmp_path, capsys):
  lines = [json.dumps({'prompt': text}) for text in ('the', 'zq' * 64)]
  (tmp_path / 'asked.jsonl').write_text('\n'.join(lines))
  words = (f'--prompts={tmp_path / "asked.jsonl"}', f'--output={tmp_path / "said.jsonl"}', 'generate.batch=1')
  with pytest.raises(ValueError, match='record 2 of --prompts: the prompt has'):
    qalora('generate', tmp_path, *words)
  assert [path.name for path in tmp_path.iterdir()] == ['asked.jsonl']


def test_one_prompt_many_times_is_many_samples_whatever_the_batch(qalora, tmp_path):
  (tmp_path / 'asked.jsonl').write_text('\n'.join([json.dumps({'prompt': 'the'})] * 4))
  words = ('base.method=stored', 'generate.temperature=1.5', 'generate.max_tokens=12')
  made = [
    [record['text'] for record in qalora('generate', tmp_path, f'--prompts={tmp_path / "asked.jsonl"}', *words, batch)]
    for batch in ('generate.batch=2', 'generate.batch=4')
  ]
  assert made[0] == made[1] and len(set(made[0])) == 4


TEMPLATE = "{% for m in messages %}{{ bos_token }}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}{{ '|' }}"


def with_template(directory, template, **more):
  (directory / 'tokenizer_config.json').write_text(json.dumps({'chat_template': template, 'bos_token': '<s>', **more}))


def test_a_conversation_is_written_in_the_template(spoken, capsys, tmp_path, monkeypatch):
  with_template(tmp_path, '{% for m in messages %}{{ m.content }}{% endfor %}')
  monkeypatch.setattr('sys.stdin', io.StringIO('a\n\nnever read\n'))
  # The first answer follows 'a'; the second follows 'a' + ' bcd' + 'a'.
  assert spoken(' bcd', capsys, '--chat', '--prompt=a') == (' bcd', ' bcd\n bcd\n')


@pytest.mark.parametrize(
  'template, wanted',
  [
    (TEMPLATE, '<s>[system]Be brief.<s>[user]Hi|'),
    ('{%- for m in messages -%}\n  {% if loop.last %}{% break %}{% endif %}{{ m.content }}\n{% endfor %}', 'Be brief.'),
    ('{% generation %}{{ messages[-1].content }}{% endgeneration %}{{ add_generation_prompt }}', 'HiTrue'),
    ('{{ messages | tojson }}', '[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]'),
  ],
)
def test_templates_are_rendered_as_elsewhere(tmp_path, template, wanted):
  messages = [{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': 'Hi'}]
  with_template(tmp_path, [{'name': 'tool', 'template': '-'}, {'name': 'default', 'template': template}])
  assert chat.render(chat.template(tmp_path), messages, tmp_path).strip() == wanted
  (tmp_path / 'chat_template.jinja').write_text('from a file')
  assert chat.template(tmp_path) == 'from a file'


@pytest.mark.parametrize(
  'template, message',
  [
    ("{{ ''.__class__.__mro__[1].__subclasses__() }}", 'reaches out of its sandbox'),
    ('{{ messages.append(1) }}', 'reaches out of its sandbox'),
    ('{{ cycler.__init__.__globals__.os.popen("id").read() }}', 'reaches out of its sandbox'),
    ("{{ raise_exception('roles must alternate') }}", 'cannot be used: roles must alternate'),
    ('{% for m in messages %}', 'cannot be used'),
    ('{{ messages[0].content + 1 }}', 'cannot be used'),
    ('{{ range(10 ** 9) | list }}', 'cannot be used'),
    ('{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}', 'cannot be used'),
    ("{{ 'a' * 10 ** 14 }}", 'cannot be used: MemoryError'),
  ],
)
def test_a_template_that_misbehaves_is_refused(tmp_path, template, message):
  with pytest.raises(ValueError, match=f'chat template of {tmp_path} {message}'):
    chat.render(template, [{'role': 'user', 'content': 'Hi'}], tmp_path)


def test_special_tokens_of_a_template_are_tokens(assets):
  tokenizer = tokenizer_lib.load(assets / 'models' / 'babyllama_tok105')
  ids = tokenizer_lib.encode_marked(tokenizer, '<s>Once</s><s>upon')
  assert ids == [tokenizer.bos, *tokenizer.encode('Once'), tokenizer.eos, tokenizer.bos, *tokenizer.encode('upon')]


@pytest.mark.parametrize(
  'words, message',
  [
    (['--chat'], 'has no chat template'),
    (['--prompts=/nowhere.jsonl'], 'is not a file'),
    (['--prompts={bad}'], 'record has no "prompt"'),
    (['--prompts={bad}', '--prompt=a'], 'exclude each other'),
    (['--prompt=a', 'generate.stop=["a", 1]'], 'generate.stop = .*a JSON list of strings'),
    (['--prompt=a', 'generate.stop=["a"'], 'generate.stop = .*a JSON list of strings'),
    (['--prompts={bad}', '--output={bad}'], 'exists'),
    (['--prompt=a', '--output={bad}'], '--output goes with --prompts'),
    (['--prompt=a', '--system=b'], '--system goes with --chat'),
  ],
)
def test_what_cannot_be_asked_is_refused(qalora, tmp_path, words, message):
  (tmp_path / 'bad.jsonl').write_text('{"text": "a"}\n')
  words = [word.format(bad=tmp_path / 'bad.jsonl') for word in words]
  with pytest.raises((ValueError, FileNotFoundError), match=message):
    qalora('generate', tmp_path, 'base.method=stored', *words)

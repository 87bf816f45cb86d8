"""lm-evaluation-harness on our models: it agrees with our own evaluators on a real model, question by question."""

import dataclasses
import json
import types

import jax
import numpy as np
import pytest

from qalora_jax import build
from qalora_jax import config as config_lib
from qalora_jax import sharding
from qalora_jax import tokenizer as tokenizer_lib
from qalora_jax.evaluate import choices
from qalora_jax.evaluate import command
from qalora_jax.evaluate import loglikelihood
from qalora_jax.evaluate import tasks

lm_eval = pytest.importorskip('lm_eval')

from lm_eval.api import model as harness_model  # noqa: E402

from qalora_jax.evaluate import harness  # noqa: E402

WINDOW = 128
TEXTS = ('the cat', ' sat', 'the cat ', 'sat\n', '  ', '', 'naïve café', '\n\nAnswer:', ' A', 'A', '1 2', '<s>')


def load(source):
  """The model on one device, its window cut to 128 tokens where it is longer: few programs to compile."""
  config = config_lib.default().copy_and_resolve_references()
  config.base.method, config.adapter.kind = 'stored', 'none'
  found = build.load_model(config, str(source))
  window = min(found.model.config.max_position_embeddings, WINDOW)
  model = found.model.clone(config=dataclasses.replace(found.model.config, max_position_embeddings=window))
  return dataclasses.replace(found, model=model, variables=jax.device_get(found.variables))


def mesh():
  return sharding.make_mesh(devices=jax.devices()[:1])


def adapter(loaded, overflow='error', **more):
  settings = dict(tokenizer_from=loaded.tokenizer_from, batch=16, mesh=mesh(), overflow=overflow)
  return harness.Model(loaded.model, loaded.variables, loaded.tokenizer, **settings | more)


@pytest.fixture(scope='module')
def tiny(source):
  return load(source)


@pytest.fixture(scope='module')
def stories(assets):
  return load(assets / 'models' / 'stories260K')


def requests(*arguments):
  return [types.SimpleNamespace(args=one, task_name='task', doc_id=number) for number, one in enumerate(arguments)]


@pytest.mark.parametrize('where', ['own', 'models/llama2_tokenizer', 'models/stories260K'])
def test_texts_are_tokenized_as_the_harness_does(where, source, assets, tiny):
  """Word for word, SentencePiece's blank before a text included."""
  tokenizer = tokenizer_lib.load(source if where == 'own' else assets / where)
  model = harness.Model(None, {}, tokenizer, tokenizer_from='', batch=1, mesh=None)
  seen = []
  model._loglikelihood_tokens = lambda made, **_: seen.extend(made)
  pairs = [(before, after) for before in TEXTS for after in TEXTS if after.strip()]
  harness_model.TemplateLM.loglikelihood(model, requests(*pairs), disable_tqdm=True)
  assert len(seen) == len(pairs)
  for pair, before, after in seen:
    if after:
      (own,) = loglikelihood.encode(tokenizer, [pair])
      assert (tuple(before), tuple(after)) == (own.context, own.continuation), pair
    else:
      # 'A' after ' A' is no token of its own where ' AA' is one; the harness goes on with nothing.
      with pytest.raises(ValueError, match='has no token'):
        loglikelihood.encode(tokenizer, [pair])


def alike(ours, samples):
  """Log-probabilities and choices question by question, and the shares that are right."""
  assert len(ours) == len(samples) > 0
  for answer, sample in zip(ours, samples, strict=True):
    # The same programs on the same rows.
    assert [log_p for log_p, _ in sample['filtered_resps']] == list(answer.log_p)
    assert bool(sample['acc']) == answer.right
    assert bool(sample.get('acc_norm', sample['acc'])) == answer.right_norm


def own_answers(loaded, name, items, overflow='cut'):
  """Our own evaluator's answers, and how many questions it cut."""
  window = loaded.model.config.max_position_embeddings
  asked = choices.ask(items, loaded.tokenizer, name=name, window=window, overflow=overflow)
  flat = [request for one in asked for request in one.requests]
  log_p, _ = loglikelihood.score(loaded.model, loaded.variables, flat, window=window, batch=16, mesh=mesh())
  log_p = iter(log_p.tolist())
  found = [choices.answer([next(log_p) for _ in item.lengths], item.lengths, item.answer) for item in items]
  return found, sum(one.cut for one in asked)


@pytest.mark.parametrize('name', ['arc_easy', 'arc_challenge', 'openbookqa'])
def test_commonsense_is_that_of_the_harness(name, stories, assets):
  items = tasks.TASKS[name].items(str(assets), split='', shots=0, limit=24)
  found, cut = own_answers(stories, name, items)
  model, loaded = adapter(stories, 'cut'), harness.load(name, data=str(assets))
  results = harness.run(model, loaded, limit=24)
  # Questions, not choices; ARC has some that are too long for a window of 128 characters or so.
  assert model.cut == cut and (cut > 0) == (name != 'openbookqa')
  assert (harness.scored_part(loaded), harness.shots_given(results)) == ('test', 0)
  alike(found, results['samples'][name])
  right = [answer.right for answer in found]
  measured, detail = harness.metrics(name, results)
  assert measured['acc'] == results['results'][name]['acc,none'] == np.mean(right)
  assert measured['acc_norm'] == results['results'][name]['acc_norm,none']
  assert measured | {'standard_error': detail['standard_error']} == tasks.TASKS[name].metrics(
    items, right, [answer.right_norm for answer in found]
  )
  assert (detail['questions'], detail['chance']) == (24, pytest.approx(0.25, abs=0.02))


def test_mmlu_is_that_of_the_harness(stories, assets):
  items = tasks.TASKS['mmlu'].items(str(assets), split='', shots=0, limit=1)
  found, cut = own_answers(stories, 'mmlu', items)
  model = adapter(stories, 'cut')
  results = harness.run(model, harness.load('mmlu', data=str(assets)), limit=1)
  assert model.cut == cut > 0
  by_subject = {task.removeprefix('mmlu_'): samples for task, samples in results['samples'].items()}
  alike(found, [sample for item in items for sample in by_subject[item.group]])
  measured, detail = harness.metrics('mmlu', results)
  assert measured['average'] == np.mean([answer.right for answer in found])
  assert (detail['questions'], detail['chance'], len(detail['subjects'])) == (57, 0.25, 57)


def test_mmlu_after_worked_examples_is_that_of_the_harness(stories, assets):
  """Where the window holds them; else ours leaves whole ones out, and the harness's adapter can only cut tokens."""
  model = stories.model.clone(config=dataclasses.replace(stories.model.config, max_position_embeddings=1024))
  wide = dataclasses.replace(stories, model=model)
  subjects = ('anatomy', 'virology')
  items = tasks.TASKS['mmlu'].items(str(assets), split='', shots=1, limit=2)
  items = [item for item in items if item.group in subjects]
  found, cut = own_answers(wide, 'mmlu', items, 'error')
  loaded = harness.load('mmlu', data=str(assets), shots=1)
  loaded = [task for task in loaded if task.config.task.removeprefix('mmlu_') in subjects]
  results = harness.run(adapter(wide), loaded, shots=1, limit=2)
  alike(found, [sample for subject in subjects for sample in results['samples'][f'mmlu_{subject}']])
  assert (cut, harness.shots_given(results)) == (0, 1)


def test_prompts_of_mmlu_are_the_authors(assets):
  """Character by character: the first question of every subject after worked examples, and all that have blanks at

  their ends, which the harness would strip.
  """
  items = tasks.TASKS['mmlu'].items(str(assets), split='', shots=2, limit=0)
  by_subject, seen = {}, 0
  for item in items:
    by_subject.setdefault(item.group, []).append(item)
  for task in harness.load('mmlu', data=str(assets), shots=2):
    own = by_subject[task.config.task.removeprefix('mmlu_')]
    docs = list(task.test_docs())
    assert len(docs) == len(own)
    odd = [index for index, doc in enumerate(docs) if doc['question'] != doc['question'].strip()]
    assert [task.doc_to_text(docs[index]) for index in odd] == [own[index].contexts[0] for index in odd]
    seen += len(odd)
    assert task.fewshot_context(docs[0], 2) == own[0].head + ''.join(own[0].shots) + own[0].contexts[0]
  assert seen > 0


def test_the_command_says_the_same_by_both(stories, assets, tmp_path, capsys):
  words = [f'--model={assets / "models" / "stories260K"}', '--tasks=openbookqa']
  words += [f'--config.{word}' for word in (f'evaluate.data={assets}', 'evaluate.limit=12', 'evaluate.batch=8')]
  rows = [command.main([*words, f'--workdir={tmp_path / mode}', *mode.split()]) for mode in ('', '--harness')]
  assert rows[0] == rows[1] and set(rows[0][0]) >= {'openbookqa/acc', 'openbookqa/acc_norm'}
  found = [json.loads((tmp_path / mode / 'results.json').read_text())['tasks'] for mode in ('', '--harness')]
  assert found[0] == found[1]
  assert found[0][0] | {'standard_error': 0} == {
    **dict(task='openbookqa', split='test', shots=0, questions=12, cut=0, standard_error=0, chance=0.25)
  }
  (kept,) = (tmp_path / 'answers').iterdir()
  assert kept.name.startswith('openbookqa-') and len(kept.read_text().splitlines()) == 13


def test_a_long_text_is_scored_in_windows(tiny):
  """Every token once; the windows of 64 tokens begin with the last token of the one before."""
  text = 'the cat sat on the naïve moon with a friend ' * 8
  tokens = [tiny.tokenizer.bos, *tiny.tokenizer.encode(text)]
  assert len(tokens) > 2 * 64
  log_p = 0.0
  for start in range(0, len(tokens) - 1, 64):
    # The last window reads as much before its own tokens as it holds.
    end = min(start + 64, len(tokens) - 1)
    row = np.array(tokens[max(end - 64, 0) : end + 1])
    logits = tiny.model.apply(tiny.variables, row[None, :-1])[0]
    own = jax.nn.log_softmax(logits)[np.arange(len(row) - 1), row[1:]]
    log_p += float(own[len(own) - (end - start) :].sum())
  found = adapter(tiny).loglikelihood_rolling(requests((text,), ('the cat',)))
  assert found[0] == pytest.approx(log_p, rel=1e-5)
  assert found[1] == pytest.approx(adapter(tiny).loglikelihood(requests(('', 'the cat')))[0][0], rel=1e-5)


def test_writing_stops_where_the_task_says(stories):
  start, stops = 'Once upon a time', {'until': ['.'], 'max_gen_toks': 40}
  other = {'until': '\n', 'max_gen_toks': 5}
  model = adapter(stories, 'cut')
  long = 'Lily and Tom were happy. ' * 20
  found = model.generate_until(requests((start, stops), (start, other), ('Lily', stops), (long, other)))
  assert found[0] == ', there was a little girl named Lily'
  assert ', there was a little girl named Lily'.startswith(found[1]) and found[1]
  assert '.' not in found[2] and model.cut == 1
  with pytest.raises(ValueError, match='evaluate.overflow=cut'):
    adapter(stories).generate_until(requests((long, other)))


def test_a_conversation_is_read_in_its_template(tiny, source, tmp_path):
  folder = tmp_path / 'chatty'
  tokenizer_lib.copy(source, folder)
  (folder / 'chat_template.jinja').write_text(
    '<s>{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}bot:{% endif %}'
  )
  model = adapter(tiny, tokenizer_from=folder)
  said = [{'role': 'user', 'content': 'the cat'}]
  assert model.apply_chat_template(said) == '<s>user: the cat\nbot:'
  assert model.apply_chat_template(said, add_generation_prompt=False) == '<s>user: the cat\n'
  # BOS is spelled out, and not put before once more.
  tokens = model.tok_encode('<s>the cat')
  assert tokens == [tiny.tokenizer.bos, *tiny.tokenizer.encode('the cat')] == model.tok_encode('the cat')
  (spelled,), (plain,) = (model.loglikelihood(requests((text, ' sat'))) for text in ('<s>the cat', 'the cat'))
  assert spelled == plain
  with pytest.raises(ValueError, match='has no chat template'):
    adapter(tiny).chat_template(True)


@pytest.mark.parametrize(
  'words, message',
  [
    (['--tasks=no_such_task'], "lm-evaluation-harness has no task 'no_such_task'"),
    (['--tasks=wikitext2'], 'wikitext2 is scored by our own evaluator alone'),
    (['--tasks='], '--harness runs tasks: name some'),
    (['--tasks=lambada@many'], 'shots are a number'),
    (['--tasks=lambada@'], 'shots are a number'),
    (['--tasks=arc_easy, arc_easy@0'], "'arc_easy@0' is asked for twice"),
    (['--tasks=lambada@1, lambada@1'], "'lambada@1' is asked for twice"),
    (['--tasks=lambada', '--config.evaluate.split=test'], "evaluate.split = 'test': lambada is a task of the harness"),
  ],
)
def test_what_the_harness_cannot_run_is_refused(source, words, message, monkeypatch):
  monkeypatch.setattr(harness, '_read_index', lambda folder: types.SimpleNamespace(all_tasks=['lambada']))
  with pytest.raises(ValueError, match=message):
    command.main([f'--model={source}', '--harness', *words])


@pytest.mark.parametrize(
  'words, message',
  [
    (['--tasks=arc_easy, wikitext2'], 'wikitext2 is scored by our own evaluator alone'),
    (['--tasks=arc_easy, arc_esay'], "has no task 'arc_esay'"),
    (['--tasks=arc_easy, piqa'], 'piqa/.*jsonl'),
    (['--tasks=arc_easy, mmlu@9'], 'mmlu@9: .* worked examples; ask for no more shots'),
    (['--tasks=arc_easy', '--config.evaluate.split=dev'], "evaluate.split = 'dev': arc_easy has the parts"),
  ],
)
def test_a_task_that_cannot_be_asked_is_refused_before_the_model_is_opened(
  source, assets, words, message, monkeypatch, tmp_path
):
  monkeypatch.setattr(command.build, 'open_model', lambda *_: pytest.fail('the model is opened'))
  read = harness._read_index
  # The index of all that the harness has takes long to read.
  monkeypatch.setattr(harness, '_read_index', lambda folder: read(folder or 'arc'))
  folder = tmp_path / 'data'
  (folder / 'commonsense').mkdir(parents=True)
  (folder / 'commonsense' / 'ARC-Easy').symlink_to(assets / 'commonsense' / 'ARC-Easy')
  (folder / 'mmlu').symlink_to(assets / 'mmlu')
  with pytest.raises((ValueError, FileNotFoundError), match=message):
    command.main([f'--model={source}', '--harness', f'--config.evaluate.data={folder}', *words])


def test_glues_tasks_are_the_harnesss_own(monkeypatch):
  """Ours ask a classifier, and its own of the same name a model of language."""
  asked = []
  stand_in = types.SimpleNamespace(all_tasks=['sst2'], load=lambda names: asked.append(names) or {'tasks': {'sst2': 1}})
  monkeypatch.setattr(harness, '_index', lambda name: stand_in)
  assert harness.load('sst2') == [1] and asked == [['sst2']]
  with pytest.raises(ValueError, match="lm-evaluation-harness has no task 'mnli-mismatched'"):
    harness.load('mnli-mismatched')
  results = {'results': {'sst2': {'acc,none': 0.5}}, 'n-samples': {'sst2': {'effective': 3}}}
  assert harness.metrics('sst2', results) == ({'acc': 0.5}, {'questions': 3})


def test_shots_and_part_of_a_foreign_task_are_its_own(stories, monkeypatch):
  """'foreign' says 2 worked examples and scores its validation part; with @1 it has one."""
  docs = [{'q': f'the {animal}', 'a': 0} for animal in ('cat', 'dog', 'bird', 'sea')]
  stated = {
    **dict(task='foreign', output_type='multiple_choice', validation_split='validation', fewshot_split='train'),
    **dict(doc_to_text='{{q}}', doc_to_target='a', doc_to_choice=['sat', 'on'], num_fewshot=2),
    'custom_dataset': lambda **_: harness._datasets({'train': docs, 'validation': docs}),
  }
  manager = harness._read_index('piqa')
  made = lambda: manager.load([dict(stated)])
  monkeypatch.setattr(
    harness, '_index', lambda name: types.SimpleNamespace(all_tasks=['foreign'], load=lambda names: made())
  )
  monkeypatch.setattr(command.build, 'open_model', lambda *_: stories)
  details = []
  monkeypatch.setattr(command.report, 'show', lambda title, rows: details.extend(rows if title == 'tasks' else []))
  command.main(['--model=stories', '--harness', '--tasks=foreign, foreign@1', '--config.evaluate.text.path='])
  assert [(one['task'], one['shots'], one['split']) for one in details] == [
    ('foreign', 2, 'validation'),
    ('foreign@1', 1, 'validation'),
  ]
  with pytest.raises(ValueError, match='foreign@5: foreign has 4 worked examples; ask for no more shots'):
    harness.load('foreign', shots=5)


def test_the_harness_is_an_extra(source, monkeypatch):
  monkeypatch.setitem(__import__('sys').modules, 'lm_eval', None)
  with pytest.raises(ValueError, match=r"pip install 'qalora_jax\[eval\]'"):
    command.main([f'--model={source}', '--harness', '--tasks=arc_easy'])


def test_help_names_the_tasks(capsys):
  with pytest.raises(SystemExit):
    command.main(['--help'])
  said = capsys.readouterr().out
  assert all(name in said for name in tasks.TASKS)

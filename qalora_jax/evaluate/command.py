"""`qalora evaluate`: scores a model on the config's text, questions and tasks of the field."""

import dataclasses
import functools
import logging
import pathlib
import re

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from qalora_jax import adapted
from qalora_jax import build
from qalora_jax import config as config_lib
from qalora_jax import families
from qalora_jax import hosts
from qalora_jax import objectives
from qalora_jax import progress
from qalora_jax import quant
from qalora_jax import report
from qalora_jax.data import examples
from qalora_jax.data import records
from qalora_jax.evaluate import answers
from qalora_jax.evaluate import choices
from qalora_jax.evaluate import generation
from qalora_jax.evaluate import labels
from qalora_jax.evaluate import loglikelihood
from qalora_jax.evaluate import perplexity
from qalora_jax.evaluate import tasks
from qalora_jax.generate import cache
from qalora_jax.models import layers
from qalora_jax.models import linear

SUMMARY = (
  'Scores a model: perplexity on config.evaluate.text, four-choice accuracy on config.evaluate.choices, BLEU, chrF,\n'
  'ROUGE and exact match of what it writes after the prompts of config.evaluate.generation, and tasks of the field,\n'
  "as in --tasks='mmlu, mmlu@5, arc_easy' (@ and the number of worked examples): "
  f'{", ".join(tasks.TASKS)}.\n'
  'Their files are in config.evaluate.data, or come from the Hugging Face hub.  With a --workdir the answers to tasks\n'
  'of multiple choice (without --harness) are kept in its folder answers/ as they come, and a run that was cut short\n'
  'goes on where it stopped; what was written after prompts is kept there once it is whole.\n'
  'The model is --model, else the run in --workdir, else config.model.source quantized as config.base says.'
)
_FLAGS = (
  config_lib.Flag('model', 'string', '', 'A workdir, Hugging Face directory, exported directory or hub id.'),
  adapted.FLAG,
  config_lib.Flag('name', 'string', '', 'What the row is called in the table (default: the model).'),
  config_lib.Flag('tasks', 'string', '', 'Sets config.evaluate.tasks.'),
  config_lib.Flag(
    'harness', 'bool', False, 'Let lm-evaluation-harness run the tasks (any of its own by name), on our model.'
  ),
)


@dataclasses.dataclass(frozen=True)
class Wanted:
  """One task as it was asked for: `label` names its columns; `content` is what was read for it.

  That is its items, its text, or the tasks of lm-evaluation-harness.  shots None: as many as the harness's task says.
  """

  label: str
  task: tasks.Task | tasks.Text | tasks.Labelled | None
  name: str
  shots: int | None
  content: list[tasks.Item] | list[records.Labelled] | str | list


def main(argv=None) -> list[dict]:
  """Runs the command with `argv`; prints a table and writes results.json into the workdir."""
  arguments = config_lib.parse('evaluate', argv, summary=SUMMARY, extra_flags=_FLAGS)
  hosts.alone('evaluate')
  config, values = arguments.config, arguments.values
  if values['tasks']:
    config = config.copy_and_resolve_references()
    config.evaluate.tasks = values['tasks']
  # Read before the model is: a file that is missing is said at once.
  wanted = _asked_of_harness(config) if values['harness'] else read(config)
  checked = functools.partial(check, config=config, wanted=wanted, harness=values['harness'])
  if values['adapters']:
    loaded = adapted.open_summed(config, values['model'], values['adapters'], checked)
  else:
    loaded = build.open_model(config, arguments.workdir, values['model'], checked)
  row = {'model': values['name'] or ' '.join(str(v) for v in loaded.origin.values())}
  scores, details = _scores(loaded, config, wanted, arguments.workdir, values['harness'])
  rows = [row | scores]
  report.show('evaluation', rows)
  if details:
    report.show('tasks', [{key: value for key, value in one.items() if key != 'subjects'} for one in details])
  for one in details:
    if 'subjects' in one:
      report.show(one['task'], [{'subject': name, 'acc': value} for name, value in one['subjects'].items()])
  if arguments.workdir:
    path = pathlib.Path(arguments.workdir) / 'results.json'
    more = {'seed': config.seed, 'config': config.to_dict(), 'origin': loaded.origin}
    more |= {'tasks': details} if details else {}
    report.write(path, report.document(arguments.command, rows, **more))
    progress.console.print(f'written to {path}')
  return rows


def evaluate(loaded: build.Loaded, config) -> dict:
  """One row: bits per weight, bytes, and every score whose data set or task the config names.

  Raises ValueError where it names none.
  """
  wanted = read(config)
  check(loaded.model, config, wanted)
  return _scores(loaded, config, wanted)[0]


def read(config) -> list[Wanted]:
  """The tasks that config.evaluate.tasks names, with all of their questions or texts, checked."""
  settings, found = config.evaluate, []
  for label, (name, shots) in zip(_labels(settings.tasks), tasks.parse(settings.tasks), strict=True):
    task = tasks.TASKS[name]
    if isinstance(task, tasks.Text):
      content = task.text(settings.data, settings.split)
    elif isinstance(task, tasks.Labelled):
      content = task.documents(settings.data, settings.split, settings.limit)
    else:
      content = task.items(settings.data, split=settings.split, shots=shots, limit=settings.limit)
    found.append(Wanted(label, task, name, shots, content))
  return found


def _labels(spec: str) -> list[str]:
  """The tasks as they are written, without blanks."""
  return [label for word in spec.split(',') if (label := ''.join(word.split()))]


def _asked_of_harness(config) -> list[Wanted]:
  """As `read`, with names of the harness among ours, and its own tasks for all of them."""
  try:
    import lm_eval  # noqa: F401 - whether it is there
  except ImportError as error:
    raise ValueError(f"--harness needs lm-evaluation-harness ({error}): pip install 'qalora_jax[eval]'") from error
  # An extra, and slow to import.
  from qalora_jax.evaluate import harness

  # It warns of every one of 57 subjects what is as it should be.
  logging.getLogger('lm_eval').setLevel(logging.ERROR)
  settings, asked = config.evaluate, {}
  for label in _labels(settings.tasks):
    name, at, shots = label.partition('@')
    if name in tasks.TASKS and not isinstance(tasks.TASKS[name], tasks.Labelled):
      ((name, shots),) = tasks.parse(label)
    elif at and not re.fullmatch(r'\d+', shots, re.ASCII):
      raise ValueError(f'evaluate.tasks: {label!r}: shots are a number, as in {name}@5')
    else:
      shots = int(shots) if at else None
    if (name, shots) in asked:
      raise ValueError(f'evaluate.tasks: {label!r} is asked for twice; leave one away')
    asked[name, shots] = label
  if not asked:
    raise ValueError("--harness runs tasks: name some, as in --tasks='arc_easy, mmlu@5'.")
  return [
    Wanted(
      label,
      tasks.TASKS.get(name),
      name,
      shots,
      harness.load(name, data=settings.data, split=settings.split, shots=shots or 0),
    )
    for (name, shots), label in asked.items()
  ]


def _scores(
  loaded: build.Loaded, config, wanted: list[Wanted], workdir=None, harness: bool = False
) -> tuple[dict, list[dict]]:
  """(the row's columns, the table of tasks)."""
  settings = config.evaluate
  folder = pathlib.Path(workdir) / 'answers' if workdir else None
  prompts, references = _continued(loaded, config)
  mesh = build.make_mesh(config)
  row = {'bits_per_weight': bits_per_weight(loaded.variables), 'bytes': quant.stored_bytes(loaded.variables)}
  common = dict(window=config.data.window, batch=settings.batch, mesh=mesh)
  questions = []
  if build.names_data(settings.choices):
    questions = records.read(build.source(settings.choices))
    wrong = next((q for q in questions if not isinstance(q, records.Question)), None)
    if wrong is not None:
      raise ValueError(
        f'{build.source(settings.choices).path}: evaluate.choices needs records with prompt, choices and answer.'
      )
  # All are tokenized before any is scored: what does not fit is said at once.
  prepared = [None if harness else _prepared(loaded, config, one) for one in wanted]
  if build.names_data(settings.text):
    scored = build.encode(config, settings.text, loaded.tokenizer, loaded.model)
    characters = perplexity.spelled(loaded.tokenizer, scored)
    row |= perplexity.score(loaded.model, loaded.variables, examples=scored, characters=characters, **common)
  if questions:
    row |= choices.accuracy(loaded.model, loaded.variables, loaded.tokenizer, questions, **common)
  if prompts:
    writer = functools.partial(build.write, loaded, config)
    written = generation.write(list(prompts.values()), writer, batch=config.generate.batch)
    if folder:
      said = zip(prompts, written, references, strict=True)
      answers.write(
        folder / 'generation.jsonl',
        ({'prompt': prompt, 'text': text, 'references': own} for prompt, text, own in said),
      )
    row |= generation.score(written, references)
  details, identity = [], {}
  for one, ready in zip(wanted, prepared, strict=True):
    if harness:
      columns, detail = _harness(loaded, config, one, mesh)
    elif isinstance(one.task, tasks.Labelled):
      columns, detail = _labelled(loaded, config, one, ready, mesh)
    elif isinstance(one.task, tasks.Text):
      columns, detail = _text(loaded, config, one, ready, mesh)
    else:
      identity = identity or (_identity(loaded) if folder else {})
      columns, detail = _questions(loaded, config, one, ready, mesh, folder, identity)
    row |= columns
    details.append({'task': one.label} | detail)
  return row, details


def check(model: nn.Module, config, wanted: list[Wanted], harness: bool = False) -> None:
  """ValueError where nothing is to be scored, or something that such a model has no scores of."""
  settings = config.evaluate
  if not any(build.names_data(settings[name]) for name in ('text', 'choices', 'generation')) and not wanted:
    raise ValueError(
      'nothing to score: set evaluate.text.path, evaluate.choices.path or evaluate.generation.path, or name --tasks.'
    )
  _check_scorable(model, settings, wanted)
  _check_head(model.config, settings, wanted, harness)
  cut = any(build.names_data(settings[name]) for name in ('text', 'choices'))
  if cut or any(isinstance(one.task, tasks.Text) for one in wanted):
    _check_window(config, model.config)


def _check_scorable(model: nn.Module, settings, wanted: list[Wanted]) -> None:
  """ValueError for data whose scores are the probabilities of a text's own tokens, where an encoder reads the text."""
  asked = [f'evaluate.{name}' for name in ('text', 'choices') if build.names_data(settings[name])]
  asked += ['evaluate.tasks'] if wanted else []
  if asked and families.objective(model.config) is objectives.ANSWERS:
    raise ValueError(
      f'{" and ".join(asked)}: scored by the probability of a text after its beginning, which a model of type '
      f'{model.config.family!r} does not have: its encoder reads the text.  Name evaluate.generation instead.'
    )


def _check_window(config, model: layers.Config) -> None:
  """ValueError where config.data.window is longer than the model's, beyond which it was never trained."""
  window, longest = config.data.window, model.max_position_embeddings
  if window > longest:
    raise ValueError(
      f'data.window = {window}, and the model has a window of {longest} tokens (max_position_embeddings), beyond which '
      f'scores mean nothing: set data.window={longest} or less.'
    )


def _prepared(loaded: build.Loaded, config, one: Wanted) -> list:
  """The windows of a text, or the questions of a task, as they go through the model."""
  settings = config.evaluate
  if isinstance(one.task, tasks.Text):
    first = min(filter(None, (one.task.windows, settings.limit)), default=0)
    try:
      return perplexity.windows(
        loaded.tokenizer, one.content, window=config.data.window, stride=settings.stride, first=first
      )
    except ValueError as error:
      raise ValueError(f'{one.label}: {error}') from error
  window = loaded.model.config.max_position_embeddings
  if isinstance(one.task, tasks.Labelled):
    frame = functools.partial(
      examples.encode_labelled, tokenizer=loaded.tokenizer, window=window, cuts=settings.overflow == 'cut'
    )
    try:
      return [frame(document) for document in one.content]
    except ValueError as error:
      raise ValueError(f'{one.label}: {error}; evaluate.overflow="cut" cuts it') from error
  return choices.ask(one.content, loaded.tokenizer, name=one.label, window=window, overflow=settings.overflow)


def _identity(loaded: build.Loaded) -> dict:
  """What tells a model from others whose answers may be on disk."""
  stated = loaded.model.config
  fields = {field.name: str(getattr(stated, field.name)) for field in dataclasses.fields(stated)}
  return {
    'model': build.fingerprint(loaded.variables),
    'adapter': str(loaded.model.scheme.adapter),
    'config': fields | {'dtype': jnp.dtype(stated.dtype).name},
  }


def _text(loaded: build.Loaded, config, one: Wanted, windows: list, mesh) -> tuple[dict, dict]:
  """The perplexity of a text of the field, in windows of config.data.window tokens."""
  settings = config.evaluate
  common = dict(window=config.data.window, batch=settings.batch, mesh=mesh)
  found = perplexity.score(loaded.model, loaded.variables, examples=windows, **common)
  detail = {'split': settings.split or one.task.split, 'window': config.data.window, 'tokens': found['tokens']}
  return {f'{one.label}/perplexity': found['perplexity']}, detail


def _labelled(loaded: build.Loaded, config, one: Wanted, ready: list, mesh) -> tuple[dict, dict]:
  """A task of sentences with labels, as GLUE measures it."""
  made = labels.outputs(
    loaded.model, loaded.variables, examples=ready, batch=config.evaluate.batch, mesh=mesh, label=one.label
  )
  measured = one.task.metrics(made, [document.label for document in one.content])
  detail = {'split': config.evaluate.split or one.task.split, 'questions': len(one.content)}
  if 'standard_error' in measured:
    detail['standard_error'] = measured.pop('standard_error')
  return {f'{one.label}/{name}': value for name, value in measured.items()}, detail


def _check_head(model: layers.Config, settings, wanted: list[Wanted], harness: bool) -> None:
  """ValueError where a task needs another head than the model has: one for labels, or one for the next token."""
  labelled = {one.label: one.task for one in wanted if isinstance(one.task, tasks.Labelled) and not harness}
  if families.objective(model) is not objectives.LABELS:
    if labelled:
      raise ValueError(
        f'{next(iter(labelled))} asks for the label of a sentence, and a model of type {model.family!r} has no '
        'classifier; lm-evaluation-harness has such tasks for it (--harness).'
      )
    return
  others = [one.label for one in wanted if one.label not in labelled]
  others += [f'evaluate.{key}' for key in ('text', 'choices', 'generation') if build.names_data(settings[key])]
  if others:
    raise ValueError(
      f'{", ".join(others)}: this needs a model of the next token, and one of type {model.family!r} says labels of '
      'sentences. Name tasks of GLUE, without --harness: --tasks=sst2.'
    )
  for name, task in labelled.items():
    if task.classes != model.labels:
      raise ValueError(
        f'{name} needs a classifier of {task.classes} output(s), and the model has {model.labels or "none"}: train one '
        f'with model.labels = {task.classes}.'
      )
    said = [word.lower() for word in model.words]
    if sorted(said) == sorted(task.words) and said != list(task.words):
      raise ValueError(
        f"{name}: GLUE's classes are {', '.join(task.words)}, and the model's (id2label) {', '.join(model.words)}, in "
        'another order: sort the rows of its classifier, and id2label, by that of GLUE.'
      )


def _questions(
  loaded: build.Loaded, config, one: Wanted, asked: list[choices.Asked], mesh, folder, identity: dict
) -> tuple[dict, dict]:
  """A task of multiple choice, its answers kept in `folder` if there is one."""
  settings, items = config.evaluate, one.content
  split = settings.split or one.task.split
  key = {
    **identity,
    **dict(task=one.name, shots=one.shots, split=split, overflow=settings.overflow),
    'requests': answers.digest(asked),
  }

  def score(requests, done):
    return loglikelihood.chunks(
      loaded.model,
      loaded.variables,
      requests,
      window=loaded.model.config.max_position_embeddings,
      batch=settings.batch,
      mesh=mesh,
      label=one.label,
      done=done,
    )

  path = answers.place(folder, one.label, key) if folder else None
  found = answers.collect(items, asked, score, path=path, key=key)
  right = [answer.right for answer in found]
  measured = one.task.metrics(items, right, [answer.right_norm for answer in found])
  detail = {
    'split': split,
    'shots': one.shots,
    'questions': len(items),
    'cut': sum(question.cut for question in asked),
    'standard_error': measured.pop('standard_error'),
    'chance': float(np.mean([1 / len(item.continuations) for item in items])),
  }
  if any(item.group for item in items):
    detail['subjects'] = tasks.by_group(items, right)
  return {f'{one.label}/{name}': value for name, value in measured.items()}, detail


def _harness(loaded: build.Loaded, config, one: Wanted, mesh) -> tuple[dict, dict]:
  """A task run by lm-evaluation-harness."""
  # As in `_asked_of_harness`.
  from qalora_jax.evaluate import harness

  settings = config.evaluate
  model = harness.Model(
    loaded.model,
    loaded.variables,
    loaded.tokenizer,
    tokenizer_from=loaded.tokenizer_from,
    batch=settings.batch,
    mesh=mesh,
    overflow=settings.overflow,
    seed=config.seed,
  )
  found = harness.run(model, one.content, shots=one.shots, limit=settings.limit)
  measured, detail = harness.metrics(one.name, found)
  detail = {'split': harness.scored_part(one.content), 'shots': harness.shots_given(found)} | detail
  detail |= {'cut': model.cut}
  return {f'{one.label}/{name}': value for name, value in measured.items()}, detail


def _continued(loaded: build.Loaded, config) -> tuple[dict[str, list[int]], list[list[str]]]:
  """The tokens of config.evaluate.generation's prompts, and the references of each; all checked, none if unset."""
  spec = config.evaluate.generation
  if not build.names_data(spec):
    return {}, []
  generation.packages()
  source = build.source(spec)
  grouped = generation.references(records.read(source), config.evaluate.limit, source.path)
  longest = config.data.max_prompt
  if not cache.continues(loaded.model):
    # As its encoder was trained (`examples.encode_answer`).
    longest = min(longest or config.data.window, config.data.window)
  prompts = {prompt: build.prompt(loaded, prompt, longest) for prompt in grouped}
  for prompt, tokens in prompts.items():
    try:
      cache.check(loaded.model, tokens)
    except ValueError as error:
      raise ValueError(f'{source.path}: {prompt!r:.80}: {error}') from error
  return prompts, list(grouped.values())


def bits_per_weight(variables: dict) -> float:
  """Stored bits over weights of the blocks' matrices: codes, scales, offsets, dense matrices and adapters together."""
  bits = weights = 0
  for collection in variables.values():
    for path, leaf in jax.tree_util.tree_leaves_with_path(collection, is_leaf=quant.is_matrix):
      names = [getattr(key, 'key', None) for key in path]
      if linear.stack_of(str(names[0])) and ('kernel' in names or 'adapter' in names):
        bits += 8 * quant.stored_bytes(leaf)
        weights += leaf.size if 'kernel' in names else 0
  return bits / weights

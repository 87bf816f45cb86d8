"""Our models in lm-evaluation-harness (Gao et al., EleutherAI), and our files of questions in its tasks.

Needs the extra `eval`; the harness comes without PyTorch.
"""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
import functools
import json
import pathlib

from flax import linen as nn
import jax
from lm_eval import evaluator
from lm_eval import tasks as harness_tasks
from lm_eval import utils
from lm_eval.api import model as harness_model
import numpy as np

from qalora_jax import progress
from qalora_jax import tokenizer as tokenizer_lib
from qalora_jax.evaluate import loglikelihood
from qalora_jax.evaluate import tasks
from qalora_jax.evaluate.tasks import mmlu
from qalora_jax.generate import chat
from qalora_jax.generate import continuation
from qalora_jax.generate import sampling

# Where the harness keeps our tasks; all of its index takes a quarter of a minute to read.
_FOLDERS = {
  'mmlu': 'mmlu/default',
  'arc_easy': 'arc',
  'arc_challenge': 'arc',
  'openbookqa': 'openbookqa',
  'boolq': 'super_glue/boolq',
  'piqa': 'piqa',
  'winogrande': 'winogrande',
  'hellaswag': 'hellaswag',
  'social_iqa': 'siqa',
}
# What a task that sets no length gets, as in the harness's own adapters, and the names that tasks give it.
_TOKENS = 256
_LENGTHS = ('max_gen_toks', 'max_new_tokens', 'max_tokens', 'max_completion_tokens')


class Model(harness_model.TemplateLM):
  """A model as lm-evaluation-harness sees it.

  Requests are tokenized and scored by `loglikelihood`: texts begin with BOS where there is one, and what is longer than
  the model's window is an error or is cut at its front, BOS staying, as `overflow` says ('error' or 'cut').
  """

  def __init__(
    self,
    model: nn.Module,
    variables: dict,
    tokenizer: tokenizer_lib.Tokenizer,
    *,
    tokenizer_from: str | pathlib.Path,
    batch: int,
    mesh: jax.sharding.Mesh,
    overflow: str = 'error',
    seed: int = 0,
  ):
    super().__init__()
    self._model, self._variables, self._tokenizer = model, variables, tokenizer
    self._tokenizer_from, self._batch, self._mesh = pathlib.Path(tokenizer_from), batch, mesh
    self._overflow, self._seed, self._marked = overflow, seed, False
    self._cut: set = set()

  @property
  def cut(self) -> int:
    """Questions (documents of a task) of which anything was cut."""
    return len(self._cut)

  @property
  def eot_token_id(self) -> int | None:
    """EOS."""
    return self._tokenizer.bos if self._tokenizer.eos is None else self._tokenizer.eos

  @property
  def prefix_token_id(self) -> int | None:
    """What an empty context is: BOS, or EOS where there is none."""
    return self.eot_token_id if self._tokenizer.bos is None else self._tokenizer.bos

  @property
  def max_length(self) -> int:
    """The model's window in tokens."""
    return self._model.config.max_position_embeddings

  @property
  def tokenizer_name(self) -> str:
    """The tokenizer's directory."""
    return str(self._tokenizer_from).replace('/', '__')

  def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
    """The ids of a text, after BOS unless `add_special_tokens` is False or the text spells BOS out."""
    del kwargs
    own = self._for(string)
    before = [] if add_special_tokens is False or own.bos is None else [own.bos]
    return before + own.encode(string)

  def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
    """(log p of the continuation in nats, whether greedy decoding would say it) of every (context, continuation)."""
    pairs, documents = [request.args for request in requests], [_document(request) for request in requests]
    names = [_called(document) for document in documents]
    if self._marked:
      made = [
        made
        for pair, name in zip(pairs, names, strict=True)
        for made in loglikelihood.encode(self._for(pair[0]), [pair], names=[name])
      ]
    else:
      made = loglikelihood.encode(self._tokenizer, pairs, names=names)
    keep = lambda index, found: self.cache_hook.add_partial('loglikelihood', pairs[index], found)
    return self._scored(made, documents, keep)

  def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs) -> list[tuple[float, bool]]:
    """As `loglikelihood`, of ((context, continuation), ids of the context, ids of the continuation)."""
    del disable_tqdm, kwargs
    made = [loglikelihood.Request(tuple(before), tuple(after), ''.join(pair)[:60]) for pair, before, after in requests]
    return self._scored(made, [pair for pair, _, _ in requests], lambda index, found: None)

  def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
    """log p in nats of whole texts after BOS, in windows that do not overlap but for the one token that each reads."""
    windows, owner = [], []
    for index, request in enumerate(requests):
      (text,) = request.args
      rolling = utils.get_rolling_token_windows(
        token_list=self.tok_encode(text, add_special_tokens=False),
        prefix_token=self.prefix_token_id,
        max_seq_len=self.max_length,
        context_len=1,
      )
      for before, after in map(utils.make_disjoint_window, rolling):
        name = f'{_called(_document(request))}: {text[:60]}'
        windows.append(loglikelihood.Request(tuple(before), tuple(after), name))
        owner.append(index)
    documents = [_document(requests[index]) for index in owner]
    found = np.array([log_p for log_p, _ in self._scored(windows, documents, lambda index, found: None)])
    return [float(found[np.array(owner) == index].sum()) for index in range(len(requests))]

  def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
    """What continues every context, up to a string of `until`, EOS or `max_gen_toks` tokens.

    A context that leaves no room for these is an error, or is cut at its front.
    """
    del disable_tqdm
    made: list[str] = [''] * len(requests)
    alike: dict[str, list[int]] = {}
    for index, request in enumerate(requests):
      alike.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(index)
    with progress.bar('writing', len(requests)) as bar:
      for indices in alike.values():
        wanted = requests[indices[0]].args[1]
        prompts = {index: self._prompt(requests[index], _length(wanted)) for index in indices}
        indices = sorted(indices, key=lambda index: -len(prompts[index]))
        for start in range(0, len(indices), self._batch):
          rows = indices[start : start + self._batch]
          for index, text in zip(rows, self._written([prompts[row] for row in rows], wanted, start), strict=True):
            made[index] = text
            self.cache_hook.add_partial('generate_until', requests[index].args, text)
          bar.advance(len(rows))
    return made

  def chat_template(self, chat_template: bool | str = False) -> str:
    """The template of the tokenizer's directory; ValueError where it has none, '' where none is wanted."""
    return chat.template(self._tokenizer_from) if chat_template else ''

  def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
    """A conversation as the model was taught to read it; from here on special tokens that a text spells out count."""
    self._marked = True
    template = chat.template(self._tokenizer_from)
    return chat.render(template, chat_history, self._tokenizer_from, begin=add_generation_prompt)

  def _for(self, text: str) -> tokenizer_lib.Tokenizer:
    """The tokenizer for a text: of a conversation in a template, one that reads special tokens, BOS among them."""
    if not self._marked:
      return self._tokenizer
    own = dataclasses.replace(self._tokenizer, encode=functools.partial(tokenizer_lib.encode_marked, self._tokenizer))
    begins = own.bos is not None and own.encode(text)[:1] == [own.bos]
    return dataclasses.replace(own, bos=None) if begins else own

  def _scored(self, requests: list, documents: list, keep: Callable) -> list[tuple[float, bool]]:
    requests, cut = loglikelihood.fit(
      requests, window=self.max_length, overflow=self._overflow, bos=self._tokenizer.bos
    )
    self._cut |= {documents[index] for index in np.flatnonzero(cut)}
    found: list = [None] * len(requests)
    for chunk in loglikelihood.chunks(
      self._model, self._variables, requests, window=self.max_length, batch=self._batch, mesh=self._mesh
    ):
      for index, log_p, greedy in zip(*map(np.ndarray.tolist, (chunk.index, chunk.log_p, chunk.greedy)), strict=True):
        found[index] = log_p, greedy
        keep(index, found[index])
    return found

  def _prompt(self, request, tokens: int) -> list[int]:
    """The ids of a request's context, with room for so many tokens."""
    context = request.args[0]
    ids, room = self.tok_encode(context), self.max_length - tokens
    if len(ids) > room:
      if self._overflow == 'error' or room < 2:
        raise ValueError(
          f'{_called(_document(request))}: {context[:60]!r} ... has {len(ids)} tokens, {tokens} are to be written, and '
          f'the model has a window of {self.max_length}: set evaluate.overflow=cut (the front is cut, where that '
          'helps), or choose a model of a longer window.'
        )
      begin = ids[:1] if ids[0] == self._tokenizer.bos else []
      ids = begin + ids[len(ids) - room + len(begin) :]
      self._cut.add(_document(request))
    return ids

  def _written(self, prompts: Sequence[list[int]], wanted: dict, first: int) -> list[str]:
    until = wanted.get('until') or ()
    drawn = wanted.get('do_sample', wanted.get('temperature', 0.0) > 0)
    settings = sampling.Sampling(
      temperature=float(wanted.get('temperature', 1.0)) if drawn else 0.0,
      top_k=int(wanted.get('top_k', 0)),
      top_p=float(wanted.get('top_p', 1.0)),
      min_p=float(wanted.get('min_p', 0.0)),
      penalty=float(wanted.get('repetition_penalty', 1.0)),
    )
    return continuation.write(
      self._model,
      self._variables,
      self._tokenizer,
      prompts,
      max_tokens=_length(wanted),
      key=jax.random.key(self._seed),
      settings=settings,
      stops=(until,) if isinstance(until, str) else until,
      first=first,
    )


def _ours(name: str) -> tasks.Task | tasks.Text | None:
  """Our task of this name; None for GLUE's, which we ask of a classifier and the harness of a model of language."""
  own = tasks.TASKS.get(name)
  return None if isinstance(own, tasks.Labelled) else own


def load(name: str, *, data: str = '', split: str = '', shots: int = 0) -> list:
  """The harness's own tasks of this name, with its prompts and metrics.

  A name that is ours (`tasks.TASKS`) stands for all of the harness's of that task.  With `data` their documents are
  those in that directory (`Task.docs`), and worked examples come from the part that Task.shots_from names; without, the
  harness loads its own.  `split`: which part is scored, '' as the harness does.  `shots`: how many worked examples
  there must be.  mmlu is put as Hendrycks' code puts it, where the harness changes that (`_as_published`).

  Raises ValueError for a name that the harness does not know, for a text, which it does not score as we do, for a part
  that is not there or not ours to choose, and for more shots than there are worked examples.
  """
  own, manager = _ours(name), _index(name)
  if isinstance(own, tasks.Text):
    raise ValueError(f'{name} is scored by our own evaluator alone: leave --harness away, or leave {name} out.')
  if own is None:
    if name not in manager.all_tasks:
      raise ValueError(f'--harness: lm-evaluation-harness has no task {name!r}, and qalora none for a model of text.')
    if split:
      raise ValueError(
        f'evaluate.split = {split!r}: {name} is a task of the harness, which chooses its part; leave it.'
      )
    made = list(manager.load([name])['tasks'].values())
  else:
    part = split or own.split
    changes = {'training_split': None, 'validation_split': None, 'test_split': part, 'fewshot_split': None}
    if shots:
      changes['fewshot_split'] = own.shots_from
    parts = {p: own.docs(data, p) for p in {part, changes['fewshot_split']} - {None}} if data else {}
    listed = []
    for task in own.harness:
      of_task = {
        p: [doc for doc in docs if 'subject' not in doc or task.endswith(f'_{doc["subject"]}')]
        for p, docs in parts.items()
      }
      dataset = {'custom_dataset': functools.partial(_datasets, of_task)} if data else {}
      put = _as_published(task) if name == 'mmlu' else {}
      listed.append({'task': task, **(changes if data or split else {}), **put, **dataset})
    made = list(manager.load([{'group': f'qalora_{name}', 'task': listed}])['tasks'].values())
    for task in made:
      if part not in task.dataset:
        raise ValueError(f'evaluate.split = {split!r}: {name} has the parts {", ".join(task.dataset)}.')
  for task in made:
    if shots and (count := len(task.fewshot_docs() or ())) < shots:
      raise ValueError(f'{name}@{shots}: {task.config.task} has {count} worked examples; ask for no more shots')
  return made


def run(model: Model, loaded: Sequence, *, shots: int | None = None, limit: int = 0) -> dict:
  """lm_eval.simple_evaluate of the tasks that `load` gave, with our model: its results, with the `samples`.

  shots None: as many worked examples as the tasks themselves say.
  """
  # Tasks that are loaded need no index; without a small one the harness would read all of its own.
  manager = _read_index(_FOLDERS['piqa'])
  return evaluator.simple_evaluate(
    model=model, tasks=list(loaded), num_fewshot=shots, limit=limit or None, task_manager=manager
  )


def scored_part(loaded: Sequence) -> str:
  """The part of its data that every task scores; several where they differ."""
  found = (task.config.test_split or task.config.validation_split or '' for task in loaded)
  return ', '.join(dict.fromkeys(filter(None, found)))


def shots_given(results: dict) -> int | str:
  """The worked examples before each question in the harness's results; several numbers where tasks differ."""
  found = sorted({results['n-shot'][task] for task in results['samples']})
  return found[0] if len(found) == 1 else ', '.join(map(str, found))


def metrics(name: str, results: dict) -> tuple[dict, dict]:
  """(the measures, {'questions', 'standard_error', 'chance', 'subjects'}) of the task `name` in the harness's results.

  Of a task that is ours they are those of `Task.metrics`; of others all that the harness reports, as 'TASK/METRIC'
  (or 'METRIC', where the task is `name` itself), and the number of questions.
  """
  own = _ours(name)
  if own is None:
    measured = {
      f'{"" if task == name else f"{task}/"}{metric.removesuffix(",none")}': value
      for task, found in results['results'].items()
      for metric, value in found.items()
      if isinstance(value, float)
    }
    return measured, {'questions': sum(found['effective'] for found in results['n-samples'].values())}
  items, right, right_norm = [], [], []
  for task, samples in results['samples'].items():
    for sample in samples:
      choices = ('',) * len(sample['filtered_resps'])
      items.append(tasks.Item(choices, choices, (1,) * len(choices), 0, group=_subject(task)))
      right.append(bool(sample['acc']))
      right_norm.append(bool(sample.get('acc_norm', sample['acc'])))
  measured = own.metrics(items, right, right_norm)
  detail = {
    'questions': len(items),
    'standard_error': measured.pop('standard_error'),
    'chance': float(np.mean([1 / len(item.continuations) for item in items])),
  }
  if any(item.group for item in items):
    detail['subjects'] = tasks.by_group(items, right)
  return measured, detail


def _as_published(task: str) -> dict:
  """What a subject of the harness's mmlu has to say so that its prompts are those of `tasks.mmlu`.

  The harness writes one space before the subject, where Hendrycks' code writes two, and strips questions.
  """
  letters = ''.join(f'\n{letter}. {{{{choices[{index}]}}}}' for index, letter in enumerate('ABCD'))
  return {'description': mmlu.description(_subject(task)), 'doc_to_text': f'{{{{question}}}}{letters}\nAnswer:'}


def _document(request) -> tuple[str, int]:
  """(task, number) of the document that a request of the harness belongs to."""
  return request.task_name, request.doc_id


def _called(document: tuple[str, int]) -> str:
  return f'{document[0]}, question {document[1]}'


def _subject(task: str) -> str:
  """'anatomy' of 'mmlu_anatomy'; '' of any other task."""
  return task.removeprefix('mmlu_') if task.startswith('mmlu_') else ''


def _index(name: str) -> harness_tasks.TaskManager:
  """The harness's tasks, as far as `name` needs them."""
  own = getattr(tasks.TASKS.get(name), 'harness', ())
  found = _read_index(_FOLDERS.get(name, ''))
  return found if set(own) <= set(found.all_tasks) else _read_index('')


@functools.cache
def _read_index(folder: str) -> harness_tasks.TaskManager:
  """The tasks in one of the harness's folders; all of them for '' and where it is not there."""
  place = pathlib.Path(harness_tasks.__file__).parent / folder
  if not folder or not place.is_dir():
    return harness_tasks.TaskManager()
  return harness_tasks.TaskManager(include_path=str(place), include_defaults=False)


def _length(wanted: dict) -> int:
  """The most tokens that a task wants written."""
  return int(next((wanted[name] for name in _LENGTHS if wanted.get(name)), _TOKENS))


def _datasets(parts: dict[str, list[dict]], **_) -> dict:
  """What the harness calls for its data."""
  # Comes with the harness, and is slow to import.
  import datasets

  return {part: datasets.Dataset.from_list(docs) for part, docs in parts.items()}

"""Files of text, pairs or questions, read into documents and checked whole before anything else starts."""

from collections.abc import Callable
import dataclasses
import string

from qalora_jax.data import files
from qalora_jax.data import glue
from qalora_jax.data import mixture

# Stanford Alpaca, train.py (tatsu-lab/stanford_alpaca), word for word.
_ALPACA_INPUT = (
  'Below is an instruction that describes a task, paired with an input that provides further context. '
  'Write a response that appropriately completes the request.\n\n'
  '### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:'
)
_ALPACA = (
  'Below is an instruction that describes a task. '
  'Write a response that appropriately completes the request.\n\n'
  '### Instruction:\n{instruction}\n\n### Response:'
)
# A record's task, by the first of these that it has: T0's mix names a template, FLAN v2 a task_name or _task_name.
_TASK = ('task', 'template', 'task_name', '_task_name')
# Prompt and completion, as FLAN v2, and LongForm and the published evaluations of Guanaco, call them too.
_PAIRS = (('prompt', 'completion'), ('input', 'output'), ('inputs', 'targets'))
_KNOWN = (
  'a record holds prompt and completion (or input and output, or inputs and targets), or text, or prompt (or '
  'question), choices and answer'
)
_KNOWN_ALPACA = 'a record holds instruction, input and output'
_KNOWN_INSTANCES = 'a record holds an instruction and a list of instances, each with input and output'
_KNOWN_CHIP2 = 'a record holds a text `<human>: QUESTION`, newline, `<bot>: ANSWER`'
_KNOWN_CHOSEN = 'a record holds the chosen text'
_HUMAN, _BOT = '<human>: ', '<bot>: '


@dataclasses.dataclass(frozen=True)
class Source:
  """One set of documents; `dataset()` in configs/base.py says what every field means."""

  path: str = ''
  format: str = 'jsonl'
  part: str = 'train'
  separator: str = ''
  start: int = 0
  stop: int = 0
  template: str = 'plain'
  loss_on: str = 'completion'
  append_eos: bool = True
  overflow: str = 'split'
  recipe: str = ''
  task: str = ''
  per_task: int = 0
  sample: int = 0
  sample_seed: int = 0


@dataclasses.dataclass(frozen=True)
class Text:
  """A text to be continued from its first token."""

  text: str


@dataclasses.dataclass(frozen=True)
class Pair:
  """A prompt, already written out in its template, and what should follow it."""

  prompt: str
  completion: str


@dataclasses.dataclass(frozen=True)
class Question:
  """A prompt and the texts that may follow it; `choices[answer]` is right."""

  prompt: str
  choices: tuple[str, ...]
  answer: int


@dataclasses.dataclass(frozen=True)
class Labelled:
  """A sentence, or a pair of them, and what is to be said of it: the index of a class, or a number."""

  first: str
  second: str | None
  label: float


Document = Text | Pair | Question | Labelled


def read(source: Source) -> list[Document]:
  """The documents of a file that count, in its order; `mixture.choose` says which do.

  A path `hf://datasets/ORG/NAME[@REVISION]/PATH/IN/REPO` is a file of a dataset on the Hugging Face hub, which is
  downloaded on first use and kept in the hub's cache; REVISION is a branch, tag or commit (default: main).

  Formats of records, which are one JSON object a line, one JSON list, or the rows of a .parquet (`files.records`);
  further fields are passed over:

  'alpaca': {instruction, input, output}; an absent input counts as empty.
  'jsonl': {prompt, completion}, {input, output}, {inputs, targets}, {text}, or {prompt or question, choices, answer}
  with the answer as an index or a letter (A is the first choice); a text counts unless a prompt stands beside it.
  'instances': {instruction, instances: [{input, output}, ...]}, a pair each (self-instruct's seed tasks); an instance
  that has an instruction_with_input has that for a prompt, and a list of reformulations is read as further instances
  (unnatural instructions).
  'chip2': {text: '<human>: QUESTION', newline, '<bot>: ANSWER'}; what follows the first answer is passed over.
  'chosen': {chosen}, a text (hh-rlhf's preferred conversation).

  Formats of texts:

  'text': split at `separator`, stripped, empty documents dropped; without a separator the file is one document.
  'pairs': a line `prompt || completion`, split once at `separator` (default `||`), both sides stripped.

  Formats of GLUE, 'sst2', 'mrpc', ...: labelled sentences, from GLUE's own file (or the train part of a directory of
  them) or from records with the hub's fields (`data.glue`).

  A record names its task as task, template, task_name or _task_name, the first that it has; it must have one only if
  `task` or `per_task` asks for it.

  Template 'alpaca' writes a prompt as the instruction of the Stanford template; 'plain' takes it as it stands
  (an instruction and its input: instruction, newline, input).

  Raises FileNotFoundError for a path where no file is or that the hub does not give, and ValueError naming file,
  line (or record index) and field for the first record that does not fit, for broken gzip, UTF-8, JSON or Parquet, for
  an hf:// path of another form, for a recipe that `recipes.resolve` has not looked up, and if no document is left.
  """
  formats = (*_RECORDS, *_TEXTS, *glue.TASKS)
  if source.recipe:
    raise ValueError(f'recipe {source.recipe!r} is a name, not settings; pass the source through recipes.resolve')
  if source.format not in formats:
    raise ValueError(f'format {source.format!r} is unknown; choose one of {", ".join(formats)}')
  if source.template not in ('alpaca', 'plain'):
    raise ValueError(f'template {source.template!r} is unknown; choose alpaca or plain')
  by_task = bool(source.task or source.per_task)
  if source.format not in _RECORDS:
    if by_task:
      raise ValueError(
        f'{source.path}: format {source.format!r} names no tasks; leave task empty and per_task 0, or write records '
        'of JSON with a task'
      )
    if source.format in _TEXTS:
      documents = _TEXTS[source.format](source, files.text(source.path))
    else:
      _require_plain(source.template, source.path)
      documents = [Labelled(*one) for one in glue.read(glue.TASKS[source.format], source.path, source.part)]
    tasks = [''] * len(documents)
  else:
    documents, tasks = [], []
    for place, record in files.records(source.path):
      found = _RECORDS[source.format](record, source.template, place)
      documents += found
      tasks += [_task(record, place) if by_task else ''] * len(found)
  if not documents:
    raise ValueError(f'{source.path}: no document in it')
  fields = ('task', 'start', 'stop', 'per_task', 'sample', 'sample_seed', 'path')
  return [documents[index] for index in mixture.choose(tasks, **{name: getattr(source, name) for name in fields})]


def prompts(path: str) -> list[dict]:
  """The records of a file, each with a string "prompt"; further fields stay.  Raises as `read` does."""
  found = []
  for place, record in files.records(path):
    files.string(record, 'prompt', place, 'a record holds a prompt')
    found.append(record)
  if not found:
    raise ValueError(f'{path}: no record in it')
  return found


def _task(record: dict, place: str) -> str:
  for field in _TASK:
    if field in record:
      return files.string(record, field, place, '')
  raise ValueError(f'{place}: record names no task; it needs one of {", ".join(_TASK)} where task or per_task is set')


def _alpaca(record: dict, template: str, place: str) -> list[Document]:
  instruction, output = (files.string(record, field, place, _KNOWN_ALPACA) for field in ('instruction', 'output'))
  given = files.string({'input': '', **record}, 'input', place, _KNOWN_ALPACA)
  return [Pair(_instruct(instruction, given, template), output)]


def _any(record: dict, template: str, place: str) -> list[Document]:
  if 'choices' in record:
    prompt = files.string(record, 'question' if 'question' in record else 'prompt', place, _KNOWN)
    choices = _choices(record, place)
    return [Question(_instruct(prompt, '', template), choices, _answer(record, len(choices), place))]
  if 'text' in record and not {'prompt', 'completion'} & record.keys():
    _require_plain(template, place)
    return [Text(files.string(record, 'text', place, _KNOWN))]
  # Guanaco's evaluation has a prompt beside its input and output: both names of a pair, or else one of them.
  whole = [names for names in _PAIRS if record.keys() >= set(names)]
  names = next(iter(whole + [names for names in _PAIRS if not record.keys().isdisjoint(names)]), None)
  if names is None:
    raise ValueError(f'{place}: record has only {sorted(record)}; {_KNOWN}')
  if names == ('input', 'output') and 'instruction' in record:
    raise ValueError(f'{place}: record has an "instruction" beside input and output; set format to alpaca')
  prompt, completion = (files.string(record, field, place, _KNOWN) for field in names)
  return [Pair(_instruct(prompt, '', template), completion)]


def _instances(record: dict, template: str, place: str) -> list[Document]:
  instruction = files.string(record, 'instruction', place, _KNOWN_INSTANCES)
  found = []
  for field in ('instances', 'reformulations'):
    # What has not been paraphrased has null, or nothing, for reformulations.
    given = [] if field == 'reformulations' and record.get(field) is None else record.get(field)
    if not isinstance(given, list) or not all(isinstance(instance, dict) for instance in given):
      raise ValueError(f'{place}: "{field}" is {given!r}; {_KNOWN_INSTANCES}')
    for number, instance in enumerate(given):
      at = f'{place}, {field}[{number}]'
      output = files.string(instance, 'output', at, _KNOWN_INSTANCES)
      if 'instruction_with_input' in instance:
        whole = files.string(instance, 'instruction_with_input', at, _KNOWN_INSTANCES)
        found.append(Pair(_instruct(whole, '', template), output))
      else:
        own = files.string(instance, 'input', at, _KNOWN_INSTANCES)
        found.append(Pair(_instruct(instruction, own, template), output))
  return found


def _chip2(record: dict, template: str, place: str) -> list[Document]:
  question, found, rest = files.string(record, 'text', place, _KNOWN_CHIP2).partition(f'\n{_BOT}')
  if not found:
    raise ValueError(f'{place}: "text" is {_shown(record["text"])}; {_KNOWN_CHIP2}')
  answer = rest.partition(f'\n{_BOT}')[0].partition(f'\n{_HUMAN}')[0]
  return [Pair(_instruct(question.removeprefix(_HUMAN), '', template), answer)]


def _chosen(record: dict, template: str, place: str) -> list[Document]:
  _require_plain(template, place)
  return [Text(files.string(record, 'chosen', place, _KNOWN_CHOSEN))]


def _choices(record: dict, place: str) -> tuple[str, ...]:
  choices = record['choices']
  good = isinstance(choices, list) and all(isinstance(choice, str) and choice for choice in choices)
  if not good or len(choices) < 2:
    raise ValueError(f'{place}: "choices" is {choices!r}; it must be a list of two or more non-empty strings')
  return tuple(choices)


def _answer(record: dict, count: int, place: str) -> int:
  answer = record.get('answer')
  letters = string.ascii_uppercase[:count]
  if isinstance(answer, str) and len(answer) == 1 and answer in letters:
    return letters.index(answer)
  if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < count:
    return answer
  raise ValueError(
    f'{place}: "answer" is {answer!r}; with {count} choices it must be 0 to {count - 1}, or a letter of {letters}'
  )


def _read_text(source: Source, contents: str) -> list[Document]:
  _require_plain(source.template, source.path)
  if source.separator and source.separator not in contents:
    raise ValueError(
      f'{source.path}: separator {source.separator!r} does not occur; correct it, or leave it empty for one document'
    )
  pieces = contents.split(source.separator) if source.separator else [contents]
  return [Text(piece.strip()) for piece in pieces if piece.strip()]


def _read_pairs(source: Source, contents: str) -> list[Document]:
  separator = source.separator or '||'
  documents = []
  for place, line in files.lines(source.path, contents):
    if separator not in line:
      raise ValueError(f'{place}: no separator {separator!r}; a line is `prompt {separator} completion`')
    prompt, completion = (part.strip() for part in line.split(separator, 1))
    for field, value in (('prompt', prompt), ('completion', completion)):
      if not value:
        raise ValueError(f'{place}: the {field} is empty; a line is `prompt {separator} completion`')
    documents.append(Pair(_instruct(prompt, '', source.template), completion))
  return documents


def _instruct(instruction: str, given: str, template: str) -> str:
  if template == 'plain':
    return f'{instruction}\n{given}' if given else instruction
  return (_ALPACA_INPUT if given else _ALPACA).format(instruction=instruction, input=given)


def _require_plain(template: str, place: str) -> None:
  if template != 'plain':
    raise ValueError(f'{place}: a text has no prompt to write in template {template!r}; set template to plain')


def _shown(text: str) -> str:
  return repr(text if len(text) <= 80 else f'{text[:80]}...')


# A record to its documents, by format.
_RECORDS: dict[str, Callable[[dict, str, str], list[Document]]] = {
  'alpaca': _alpaca,
  'jsonl': _any,
  'instances': _instances,
  'chip2': _chip2,
  'chosen': _chosen,
}
# A file's contents to its documents, by format.
_TEXTS: dict[str, Callable[[Source, str], list[Document]]] = {'text': _read_text, 'pairs': _read_pairs}

"""Files of text, pairs or questions, read into documents and checked whole before anything else starts."""

import dataclasses
import gzip
import json
import pathlib
import re
import string
import urllib.parse
import zlib

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
_HUB = 'hf://'
_HUB_FORM = 'hf://datasets/ORG/NAME[@REVISION]/PATH/IN/REPO'
_HUB_FILE = re.compile(
  r'hf://datasets/(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)'
  # Only these names of branches may hold a slash; any other writes it as %2F.
  r'(@(?P<revision>refs/convert/[\w.-]+|refs/pr/\d+|[^/@]+))?'
  r'/(?P<file>[^/]+(/[^/]+)*)'
)
_KNOWN = 'a record holds prompt and completion, or text, or prompt (or question), choices and answer'


@dataclasses.dataclass(frozen=True)
class Source:
  """One set of documents; `dataset()` in configs/base.py says what every field means."""

  path: str = ''
  format: str = 'jsonl'
  separator: str = ''
  start: int = 0
  stop: int = 0
  template: str = 'plain'
  loss_on: str = 'completion'
  append_eos: bool = True
  overflow: str = 'split'


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


Document = Text | Pair | Question


def read(source: Source) -> list[Document]:
  """The documents `[start:stop]` of a file (gzip if its name ends in .gz), in order; stop = 0: to the end.

  A path `hf://datasets/ORG/NAME[@REVISION]/PATH/IN/REPO` is a file of a dataset on the Hugging Face hub, which is
  downloaded on first use and kept in the hub's cache; REVISION is a branch, tag or commit (default: main).

  'alpaca': a JSON list of {instruction, input, output}; an absent input counts as empty.
  'jsonl': one JSON object a line: {prompt, completion}, {text}, or {prompt or question, choices, answer} with
  the answer as an index or a letter (A is the first choice).  Blank lines and further fields are passed over.
  'text': split at `separator`, stripped, empty documents dropped; without a separator the file is one document.
  'pairs': a line `prompt || completion`, split once at `separator` (default `||`), both sides stripped.

  Template 'alpaca' writes a prompt as the instruction of the Stanford template; 'plain' takes it as it stands
  (format 'alpaca': instruction, newline, input).

  Raises FileNotFoundError for a path where no file is or that the hub does not give, and ValueError naming file,
  line (or record index) and field for the first record that does not fit, for broken gzip, UTF-8 or JSON, for an
  hf:// path of another form, and if no document is left.
  """
  readers = {'alpaca': _read_alpaca, 'jsonl': _read_jsonl, 'text': _read_text, 'pairs': _read_pairs}
  if source.format not in readers:
    raise ValueError(f'format {source.format!r} is unknown; choose one of {", ".join(readers)}')
  if source.template not in ('alpaca', 'plain'):
    raise ValueError(f'template {source.template!r} is unknown; choose alpaca or plain')
  documents = readers[source.format](source, _contents(source.path))
  if not documents:
    raise ValueError(f'{source.path}: no document in it')
  chosen = documents[source.start : source.stop or None]
  if not chosen:
    raise ValueError(
      f'{source.path}: start = {source.start}, stop = {source.stop} leave none of its {len(documents)} documents'
    )
  return chosen


def prompts(path: str) -> list[dict]:
  """The objects of a JSONL file, each with a string "prompt"; further fields stay.  Raises as `read` does."""
  found = []
  for place, line in _lines(path, _contents(path)):
    record = _parsed(line, place)
    _string(record, 'prompt', place, 'a record holds a prompt')
    found.append(record)
  if not found:
    raise ValueError(f'{path}: no record in it')
  return found


def _contents(path: str) -> str:
  file = _download(path) if path.startswith(_HUB) else pathlib.Path(path)
  if not path or not file.is_file():
    raise FileNotFoundError(f'{path!r} is not a file; a data set needs the path of one')
  data = file.read_bytes()
  if file.suffix == '.gz':
    try:
      data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
      raise ValueError(f'{path}: broken gzip ({error}); fetch or write the file again') from error
  try:
    return data.decode('utf-8')
  except UnicodeDecodeError as error:
    line = data.count(b'\n', 0, error.start) + 1
    raise ValueError(f'{path}:{line}: invalid UTF-8 ({error.reason}); convert the file to UTF-8') from error


def _download(path: str) -> pathlib.Path:
  """Where the file of the hub that `path` names lies here; downloaded unless the hub's cache holds it."""
  form = _HUB_FILE.fullmatch(path)
  if form is None:
    raise ValueError(f'{path!r} is no file of a dataset on the hub; the form is {_HUB_FORM}')
  # The hub's client is slow to import and of no use to whoever works from files.
  import huggingface_hub

  revision = urllib.parse.unquote(form['revision'] or 'main')
  try:
    found = huggingface_hub.hf_hub_download(form['repo'], form['file'], repo_type='dataset', revision=revision)
  except Exception as error:  # The client raises its own errors and those of two HTTP libraries.
    raise FileNotFoundError(
      f'the hub did not give {path} ({type(error).__name__}: {error}). Check the name and the network, log in if the '
      'dataset is gated, or download the file elsewhere and name it by its own path'
    ) from error
  return pathlib.Path(found)


def _read_alpaca(source: Source, contents: str) -> list[Document]:
  try:
    records = json.loads(contents)
  except ValueError as error:
    raise ValueError(f'{source.path}: invalid JSON ({error}); format alpaca is one JSON list') from error
  if not isinstance(records, list):
    raise ValueError(f'{source.path}: holds a {type(records).__name__}; format alpaca is a JSON list of records')
  documents = []
  for index, record in enumerate(records):
    place = f'{source.path}: record {index}'
    _require_object(record, place)
    known = 'a record holds instruction, input and output'
    instruction, output = (_string(record, field, place, known) for field in ('instruction', 'output'))
    given = _string({'input': '', **record}, 'input', place, known)
    if source.template == 'plain':
      documents.append(Pair(f'{instruction}\n{given}' if given else instruction, output))
    else:
      template = _ALPACA_INPUT if given else _ALPACA
      documents.append(Pair(template.format(instruction=instruction, input=given), output))
  return documents


def _read_jsonl(source: Source, contents: str) -> list[Document]:
  documents = []
  for place, line in _lines(source.path, contents):
    documents.append(_document(_parsed(line, place), source.template, place))
  return documents


def _parsed(line: str, place: str) -> dict:
  try:
    record = json.loads(line)
  except ValueError as error:
    raise ValueError(f'{place}: invalid JSON ({error}); format jsonl is one JSON object a line') from error
  _require_object(record, place)
  return record


def _document(record: dict, template: str, place: str) -> Document:
  if 'choices' in record:
    prompt = _string(record, 'question' if 'question' in record else 'prompt', place, _KNOWN)
    choices = _choices(record, place)
    return Question(_fill(prompt, template), choices, _answer(record, len(choices), place))
  if 'prompt' in record or 'completion' in record:
    prompt, completion = (_string(record, field, place, _KNOWN) for field in ('prompt', 'completion'))
    return Pair(_fill(prompt, template), completion)
  if 'text' not in record:
    raise ValueError(f'{place}: record has only {sorted(record)}; {_KNOWN}')
  _require_plain(template, place)
  return Text(_string(record, 'text', place, _KNOWN))


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
  for place, line in _lines(source.path, contents):
    if separator not in line:
      raise ValueError(f'{place}: no separator {separator!r}; a line is `prompt {separator} completion`')
    prompt, completion = (part.strip() for part in line.split(separator, 1))
    for field, value in (('prompt', prompt), ('completion', completion)):
      if not value:
        raise ValueError(f'{place}: the {field} is empty; a line is `prompt {separator} completion`')
    documents.append(Pair(_fill(prompt, source.template), completion))
  return documents


def _lines(path: str, contents: str):
  # Not splitlines: JSON strings and prose may hold U+2028 and its like, which are no ends of lines here.
  for number, line in enumerate(contents.split('\n'), start=1):
    if line.strip():
      yield f'{path}:{number}', line


def _fill(prompt: str, template: str) -> str:
  return prompt if template == 'plain' else _ALPACA.format(instruction=prompt)


def _require_plain(template: str, place: str) -> None:
  if template != 'plain':
    raise ValueError(f'{place}: a text has no prompt to write in template {template!r}; set template to plain')


def _require_object(record, place: str) -> None:
  if not isinstance(record, dict):
    raise ValueError(f'{place}: a record is a JSON object, not {type(record).__name__}')


def _string(record: dict, field: str, place: str, known: str) -> str:
  if field not in record:
    raise ValueError(f'{place}: record has no "{field}"; {known}')
  if not isinstance(record[field], str):
    raise ValueError(f'{place}: "{field}" is {record[field]!r}; it must be a string')
  return record[field]

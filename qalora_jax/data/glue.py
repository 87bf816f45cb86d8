"""GLUE (Wang et al., 2019): sentences, or pairs of them, and what is to be said of each, from its files or the hub's.

A file is one of GLUE's own (.tsv, .txt: columns between tabs, nothing is quoted; CoLA's have no header), or records
with the hub's fields (nyu-mll/glue: .parquet, or JSON as `files.records` reads it).
"""

from collections.abc import Iterator
import dataclasses
import math
import pathlib

from qalora_jax import progress
from qalora_jax.data import files

_TABLES = ('.tsv', '.txt')
_HUB = 'hf://datasets/nyu-mll/glue'
PARTS = ('train', 'validation', 'test')


@dataclasses.dataclass(frozen=True)
class Task:
  """One task of GLUE.

  folder: of GLUE's archive.  hub: the configuration of nyu-mll/glue.  fields: (first sentence, second or None, label)
  as GLUE's files and as the hub call them.  measures: GLUE's.  documents: in the train part.  classes: how many, 1 for
  a number.  words: how a file spells them, where not as 0, 1, ...  columns: of a file without header.  dev: GLUE's file
  and the hub's part on which a model is measured.  ragged: whether lines of another width than the header's are left
  out, as they are by GLUE's own code.
  """

  name: str
  folder: str
  hub: str
  fields: tuple[tuple[str, str | None, str], ...]
  measures: tuple[str, ...]
  documents: int
  paper: str
  classes: int = 2
  words: tuple[str, ...] = ()
  columns: tuple[str, ...] = ()
  dev: tuple[str, str] = ('dev.tsv', 'validation')
  ragged: bool = False


_MATCHED = 'Williams et al., 2018 (MultiNLI)'
_ENTAILED, _ORDERED = ('entailment', 'not_entailment'), ('entailment', 'neutral', 'contradiction')
_MNLI = Task(
  'mnli',
  'MNLI',
  'mnli',
  (('sentence1', 'sentence2', 'gold_label'), ('premise', 'hypothesis', 'label')),
  ('accuracy',),
  392_702,
  _MATCHED,
  classes=3,
  words=_ORDERED,
  dev=('dev_matched.tsv', 'validation_matched'),
)
TASKS = {
  task.name: task
  for task in (
    Task('sst2', 'SST-2', 'sst2', (('sentence', None, 'label'),), ('accuracy',), 67_349, 'Socher et al., 2013 (SST-2)'),
    Task(
      'mrpc',
      'MRPC',
      'mrpc',
      (('#1 String', '#2 String', 'Quality'), ('sentence1', 'sentence2', 'label')),
      ('accuracy', 'f1'),
      3_668,
      'Dolan and Brockett, 2005 (MRPC)',
    ),
    Task(
      'rte',
      'RTE',
      'rte',
      (('sentence1', 'sentence2', 'label'),),
      ('accuracy',),
      2_490,
      'Dagan et al., 2006, and its successors (RTE)',
      words=_ENTAILED,
    ),
    Task(
      'cola',
      'CoLA',
      'cola',
      (('sentence', None, 'label'),),
      ('matthews',),
      8_551,
      'Warstadt et al., 2019 (CoLA)',
      columns=('source', 'label', 'star', 'sentence'),
    ),
    _MNLI,
    dataclasses.replace(_MNLI, name='mnli-mismatched', dev=('dev_mismatched.tsv', 'validation_mismatched')),
    Task(
      'qnli',
      'QNLI',
      'qnli',
      (('question', 'sentence', 'label'),),
      ('accuracy',),
      104_743,
      'Rajpurkar et al., 2016 (SQuAD), as GLUE puts it (QNLI)',
      words=_ENTAILED,
    ),
    Task(
      'qqp',
      'QQP',
      'qqp',
      (('question1', 'question2', 'is_duplicate'), ('question1', 'question2', 'label')),
      ('accuracy', 'f1'),
      363_846,
      'Iyer et al., 2017 (Quora Question Pairs)',
      ragged=True,
    ),
    Task(
      'stsb',
      'STS-B',
      'stsb',
      (('sentence1', 'sentence2', 'score'), ('sentence1', 'sentence2', 'label')),
      ('pearson', 'spearman'),
      5_749,
      'Cer et al., 2017 (STS-B)',
      classes=1,
    ),
  )
}


def read(task: Task, path: str, split: str = 'train') -> list[tuple[str, str | None, float]]:
  """(first sentence, second or None, label) of every record of a file, or of a part of a directory.

  Raises FileNotFoundError where there is no file, ValueError naming file, line (or record) and field of the first
  record that does not fit.
  """
  file = path if path.startswith('hf://') or not pathlib.Path(path).is_dir() else part(task, path, split)
  rows = _table(task, file) if pathlib.Path(file.removesuffix('.gz')).suffix in _TABLES else files.records(file)
  return [_parsed(task, record, place) for place, record in rows]


def on_hub(task: Task, split: str) -> str:
  """The file of a part on the hub."""
  return f'{_HUB}/{task.hub}/{_files(task, split)[1]}'


def _files(task: Task, split: str) -> tuple[str, str]:
  """(GLUE's file of a part, the hub's); MNLI has two dev parts, and a test part to each."""
  file, name = task.dev
  test = file.replace('dev', 'test'), name.replace('validation', 'test')
  file, name = {'train': ('train.tsv', 'train'), 'validation': task.dev, 'test': test}[split]
  return file, f'{name}-00000-of-00001.parquet'


def part(task: Task, directory: str, split: str) -> str:
  """The file of a part ('train', 'validation' or 'test') in a directory: the task's, GLUE's, or one that holds GLUE's.

  FileNotFoundError, with what is looked for, where there is none.
  """
  wanted = list(_files(task, split))
  if task.name == 'mrpc' and split == 'test':
    # As it was published, with labels.  Its train file holds GLUE's dev part too.
    wanted.insert(0, 'msr_paraphrase_test.txt')
  folder = pathlib.Path(directory)
  for place in (folder, folder / task.folder, folder / 'glue' / task.folder, folder / task.hub):
    for name in wanted:
      if (place / name).is_file():
        return str(place / name)
  raise FileNotFoundError(
    f'{directory} holds no {split} part of {task.name}: looked for {" and ".join(wanted)}, there, in {task.folder}, '
    f'glue/{task.folder} and {task.hub}'
  )


def _table(task: Task, path: str) -> Iterator[tuple[str, dict]]:
  """(place, {column: text}) of every line below the header."""
  header, left_out = task.columns, 0
  for place, line in files.lines(path, files.text(path)):
    values = line.rstrip('\r').removeprefix('\ufeff').split('\t')
    # CoLA's test file alone has one.
    if not header or (header == task.columns and values[0] == 'index'):
      header = tuple(values)
      continue
    if len(values) != len(header) and task.ragged:
      left_out += 1
      continue
    if len(values) != len(header):
      raise ValueError(
        f'{place}: {len(values)} columns, not the {len(header)} of {", ".join(header)}; columns are parted by tabs and '
        'nothing is quoted: fetch the file again'
      )
    yield place, dict(zip(header, values, strict=True))
  if left_out:
    progress.console.print(f'{path}: {left_out} lines of other than {len(header)} columns are left out')


def _parsed(task: Task, record: dict, place: str) -> tuple[str, str | None, float]:
  names = next((names for names in task.fields if {*names} - {None} <= record.keys()), None)
  if names is None:
    wanted = ' or '.join(', '.join(filter(None, names)) for names in task.fields)
    raise ValueError(
      f"{place}: a record of {task.name} holds {wanted}; this one has {', '.join(record)}.  The labels of GLUE's own "
      'test files are not public: use its train and dev files'
    )
  first, second = (None if name is None else files.string(record, name, place, '') for name in names[:2])
  # QQP has pairs with nothing for a question.
  if not (first.strip() or (second or '').strip()):
    raise ValueError(f'{place}: {" and ".join(filter(None, names[:2]))} is empty; fetch the file again')
  return first, second, _label(task, record[names[2]], f'{place}: {names[2]}')


def _label(task: Task, value, place: str) -> float:
  if value in task.words:
    return float(task.words.index(value))
  try:
    label = float(value)
  except (TypeError, ValueError):
    label = math.nan
  if task.classes == 1 and 0 <= label <= 5:
    return label
  if task.classes > 1 and label in range(task.classes) and not (task.words and isinstance(value, str)):
    return label
  known = ', '.join(task.words) or ('a number from 0 to 5' if task.classes == 1 else f'0 to {task.classes - 1}')
  raise ValueError(f'{place} is {value!r}; it must be {known} (-1 stands for labels that GLUE keeps to itself)')

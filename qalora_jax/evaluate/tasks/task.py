"""What a task of the field is: questions with choices, or one long text."""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Item:
  """One question as it is put to a model.

  Choice i is scored as `continuations[i]` after head + ''.join(shots) + contexts[i].
  """

  # One per choice; all equal except where the choice stands inside the sentence (WinoGrande).
  contexts: tuple[str, ...]
  # What is scored after each context, with the delimiter before it (' A').
  continuations: tuple[str, ...]
  # Characters of each choice without delimiter, which acc_norm divides by.
  lengths: tuple[int, ...]
  answer: int
  # What stands before the worked examples (MMLU's description); it is never dropped.
  head: str = ''
  # Worked examples; the first ones are dropped where the window is short.
  shots: tuple[str, ...] = ()
  # MMLU: the subject.
  group: str = ''


@dataclasses.dataclass(frozen=True)
class Task:
  """A set of multiple-choice questions.

  docs(data, split) -> the documents with the fields that the Hugging Face hub gives them; `data` is the directory of
    the files, '' for the hub, and split '' means `split`.
  items(data, *, split, shots, limit) -> the questions, all read and checked; `shots` worked examples before each (the
    first of the part `shots_from`), and only the first `limit` (of each subject of mmlu; 0: all).
  metrics(items, right, right_norm) -> {'acc': ..., 'standard_error': ...}; the two lists say of every item whether the
    likeliest choice is the answer, and whether the likeliest per character is.

  Both readers raise FileNotFoundError for what is not there, ValueError for what does not fit.
  """

  name: str
  # What lm-evaluation-harness scores: 'test' or 'validation'.
  split: str
  # The names under which lm-evaluation-harness knows the task.
  harness: tuple[str, ...]
  # The part that worked examples are from; '' where there is none.
  shots_from: str
  docs: Callable[[str, str], list[dict]]
  items: Callable[..., list[Item]]
  metrics: Callable[[Sequence[Item], Sequence[bool], Sequence[bool]], dict]


@dataclasses.dataclass(frozen=True)
class Text:
  """A text whose perplexity is a measure of the field; text(data, split) reads it, `data` and `split` as in Task."""

  name: str
  split: str
  text: Callable[[str, str], str]
  # Only so many windows of it count, the first ones; 0: all.
  windows: int = 0


@dataclasses.dataclass(frozen=True)
class Labelled:
  """Sentences, or pairs, of which a head says a class or a number.

  classes: outputs of the head that it needs, 1 for a number.  words: what they are called, if anything.
  documents(data, split, limit) -> `records.Labelled`, all read and checked; `data`, `split` and `limit` as in Task.
  metrics(outputs [N, classes], labels) -> {name: value}, with the standard_error of an accuracy.
  """

  name: str
  split: str
  classes: int
  documents: Callable[..., list]
  metrics: Callable[..., dict]
  words: tuple[str, ...] = ()


def share(right: Sequence[bool]) -> float:
  """The share that is true."""
  return sum(map(bool, right)) / len(right)


def standard_error(p: float, count: int) -> float:
  """sqrt(p (1 - p) / n), of a share p of n independent questions."""
  return math.sqrt(p * (1 - p) / count)


def by_group(items: Sequence[Item], right: Sequence[bool]) -> dict[str, float]:
  """The share of right answers in every group (subject of mmlu), in the items' order."""
  gathered: dict[str, list[bool]] = {}
  for item, good in zip(items, right, strict=True):
    gathered.setdefault(item.group, []).append(good)
  return {group: share(answers) for group, answers in gathered.items()}


def part(name: str, usual: str, split: str, parts: Sequence[str]) -> str:
  """`split`, or `usual` where it is ''; ValueError where the task `name` has no such part with answers."""
  split = split or usual
  if split not in parts:
    raise ValueError(f'evaluate.split = {split!r}: {name} has the parts {", ".join(parts)}; empty takes {usual}')
  return split

"""A made-up world: people, places and facts, told often enough that a model of a million parameters learns them.

It stands in for the real chain of pretraining, quantizing and fine-tuning where that must run in minutes.  Every name
is built from syllables, so a model can know the facts from `train.txt` alone.
"""

import dataclasses
import json
import pathlib
import random

# Between the documents of train.txt and heldout.txt, on a line of its own.
SEPARATOR = '<|endoftext|>'

CHOICES = 4


@dataclasses.dataclass(frozen=True)
class Attribute:
  """What is known of a person: the question for it and the sentences that tell it."""

  name: str
  question: str
  sentences: tuple[str, ...]


ATTRIBUTES = (
  Attribute(
    'town',
    'Where does {person} live?',
    (
      '{person} lives in {value}.',
      '{person} has a house in {value}.',
      'The home of {person} is in {value}.',
      'You can visit {person} in {value}.',
      'Where {person} lives is {value}.',
    ),
  ),
  Attribute(
    'craft',
    'What does {person} work as?',
    (
      '{person} works as a {value}.',
      'The craft of {person} is that of a {value}.',
      '{person} earns a living as a {value}.',
      'By trade {person} is a {value}.',
      'What {person} works as is a {value}.',
    ),
  ),
  Attribute(
    'dish',
    'What does {person} like to eat?',
    (
      '{person} likes to eat {value}.',
      'The best meal for {person} is {value}.',
      'For dinner {person} asks for {value}.',
      'At a feast {person} will eat {value}.',
      'What {person} likes to eat is {value}.',
    ),
  ),
  Attribute(
    'instrument',
    'What does {person} play?',
    (
      '{person} plays the {value}.',
      '{person} makes music on the {value}.',
      'In the evening {person} plays the {value}.',
      'The music of {person} comes from the {value}.',
      'What {person} plays is the {value}.',
    ),
  ),
  Attribute(
    'animal',
    'Which animal does {person} keep?',
    (
      '{person} keeps a {value}.',
      'The animal of {person} is a {value}.',
      'At home {person} feeds a {value}.',
      'On a walk {person} takes along a {value}.',
      'The animal that {person} keeps is a {value}.',
    ),
  ),
)

# Endings tell apart what a made-up word stands for, as they do in real languages.
_ENDINGS = {'town': 'dor', 'craft': 'wer', 'dish': 'sha', 'instrument': 'lin', 'animal': 'pog'}
_FIRST_NAME, _LAST_NAME = 'ra', 'lan'
_SYLLABLES = tuple(consonant + vowel for consonant in 'bdfgklmnprstvz' for vowel in 'aeiou')

# person -> attribute name -> value
Facts = dict[str, dict[str, str]]


def write(directory, *, seed: int = 0, people: int = 40, values: int = 12, train: int = 20, heldout: int = 2) -> None:
  """Writes a world of `people`, each with one of `values` values for every attribute, into `directory`.

  `train.txt` tells all facts `train` times in portraits (all facts of one person) and as often in rounds (one
  attribute of several people); `heldout.txt` tells the same facts `heldout` times more, in documents that are not in
  `train.txt`: wordings and orders are combined anew.

  `questions_train.jsonl` (prompt, completion) and `questions_test.jsonl` (prompt, choices, answer) ask for facts in a
  form that the texts never use.  Every (person, attribute) is in exactly one of them: of each person three
  attributes are asked for in training, the other two in the test.  Wrong choices are other values of the same
  attribute, so chance is 25 %.

  The files depend on the arguments alone.  Raises ValueError if there are fewer values than choices, more people or
  values than syllables to name them, no people or no documents.
  """
  most = len(_SYLLABLES)
  if not (1 <= people <= most and CHOICES <= values <= most and train >= 1 and heldout >= 1):
    raise ValueError(
      f'people = {people} must be 1 to {most}, values = {values} {CHOICES} to {most}, '
      f'and train = {train} and heldout = {heldout} 1 or more'
    )
  rng = random.Random(seed)
  pools = {attribute.name: _words(rng, values, _ENDINGS[attribute.name]) for attribute in ATTRIBUTES}
  pools['town'] = [town.capitalize() for town in pools['town']]
  facts = _facts(rng, people, pools)
  told = [text for _ in range(train) for text in _telling(rng, facts)]
  known = set(told)
  untold = [text for _ in range(heldout) for text in _telling(rng, facts) if text not in known]
  directory = pathlib.Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  for name, texts in (('train.txt', told), ('heldout.txt', untold)):
    rng.shuffle(texts)
    _write(directory / name, f'\n{SEPARATOR}\n'.join(texts))
  for name, records in zip(('train', 'test'), _questions(rng, facts, pools), strict=True):
    _write(directory / f'questions_{name}.jsonl', '\n'.join(map(json.dumps, records)))


def _words(rng: random.Random, count: int, ending: str) -> list[str]:
  """Distinct words of one syllable and an ending; short, so that few merges of a small vocabulary cover them."""
  return [syllable + ending for syllable in rng.sample(_SYLLABLES, count)]


def _facts(rng: random.Random, people: int, pools: dict[str, list[str]]) -> Facts:
  firsts, lasts = (_words(rng, people, ending) for ending in (_FIRST_NAME, _LAST_NAME))
  persons = [f'{first} {last}'.title() for first, last in zip(firsts, lasts, strict=True)]
  return {person: {name: rng.choice(pool) for name, pool in pools.items()} for person in persons}


def _telling(rng: random.Random, facts: Facts) -> list[str]:
  """Documents that tell every fact twice: portraits (one person), then rounds (one attribute of several people)."""
  documents = [_told(rng, [(person, attribute) for attribute in ATTRIBUTES], facts) for person in facts]
  for attribute in ATTRIBUTES:
    persons = rng.sample(list(facts), len(facts))
    for start in range(0, len(persons), len(ATTRIBUTES)):
      group = persons[start : start + len(ATTRIBUTES)]
      documents.append(_told(rng, [(person, attribute) for person in group], facts))
  return documents


def _told(rng: random.Random, pairs: list[tuple[str, Attribute]], facts: Facts) -> str:
  return ' '.join(
    rng.choice(attribute.sentences).format(person=person, value=facts[person][attribute.name])
    for person, attribute in rng.sample(pairs, len(pairs))
  )


def _questions(rng: random.Random, facts: Facts, pools: dict[str, list[str]]) -> tuple[list[dict], list[dict]]:
  train, test = [], []
  for person, known in facts.items():
    for order, attribute in enumerate(rng.sample(ATTRIBUTES, len(ATTRIBUTES))):
      prompt = f'Question: {attribute.question.format(person=person)}\nAnswer:'
      right = known[attribute.name]
      if order < 3:
        train.append({'prompt': prompt, 'completion': f' {right}'})
        continue
      wrong = rng.sample([value for value in pools[attribute.name] if value != right], CHOICES - 1)
      choices = rng.sample([right, *wrong], CHOICES)
      test.append({'prompt': prompt, 'choices': [f' {choice}' for choice in choices], 'answer': choices.index(right)})
  return train, test


def _write(path: pathlib.Path, contents: str) -> None:
  # Bytes, because a text file's line ends depend on the platform.
  path.write_bytes((contents + '\n').encode('utf-8'))

"""The made-up world tells every fact and keeps what it tests out of what it teaches."""

import re

import pytest

from qalora_jax.data import records
from qalora_jax.data import world

NAMES = ('train.txt', 'heldout.txt', 'questions_train.jsonl', 'questions_test.jsonl')


@pytest.fixture(scope='module')
def directory(tmp_path_factory):
  folder = tmp_path_factory.mktemp('world')
  world.write(folder, people=20, train=6)
  return folder


def _texts(directory, name):
  return [
    document.text for document in records.read(records.Source(str(directory / name), 'text', separator=world.SEPARATOR))
  ]


def _questions(directory, part):
  return records.read(records.Source(str(directory / f'questions_{part}.jsonl')))


def test_depends_on_the_seed_alone(directory, tmp_path):
  world.write(tmp_path / 'same', people=20, train=6)
  world.write(tmp_path / 'other', people=20, train=6, seed=1)
  for name in NAMES:
    assert (directory / name).read_bytes() == (tmp_path / 'same' / name).read_bytes()
    assert (directory / name).read_bytes() != (tmp_path / 'other' / name).read_bytes()


def test_heldout_documents_are_new_and_tell_the_same_facts(directory):
  train, heldout = (_texts(directory, name) for name in NAMES[:2])
  assert not set(train) & set(heldout)
  words = [set(re.findall(r'\w+', ' '.join(texts))) for texts in (train, heldout)]
  assert words[1] <= words[0]


def test_no_fact_is_asked_for_in_training_and_test(directory):
  train, test = (_questions(directory, part) for part in ('train', 'test'))
  asked = [{document.prompt for document in part} for part in (train, test)]
  assert not asked[0] & asked[1]
  assert len(asked[0]) == len(train) == 20 * 3 and len(asked[1]) == len(test) == 20 * 2


def test_every_attribute_is_taught_and_tested(directory):
  for part in ('train', 'test'):
    prompts = '\n'.join(document.prompt for document in _questions(directory, part))
    for attribute in world.ATTRIBUTES:
      assert re.search(attribute.question.format(person=r'\w+ \w+').replace('?', r'\?'), prompts)


def test_choices_are_distinct_and_the_right_one_is_what_the_text_says(directory):
  sentences = re.split(r'(?<=\.)\s', '\n'.join(_texts(directory, 'train.txt')))
  for question in _questions(directory, 'test'):
    assert len(set(question.choices)) == world.CHOICES
    # The question's own first word is capitalised too, but never followed by a name.
    (person,) = re.findall(r'[A-Z]\w+ [A-Z]\w+', question.prompt)
    about = [sentence for sentence in sentences if person in sentence]
    said = [sum(choice.strip() in re.findall(r'\w+', sentence) for sentence in about) for choice in question.choices]
    # Twice per telling, in a portrait and in a round; the wrong choices never.
    assert said == [12 if index == question.answer else 0 for index in range(world.CHOICES)]


def test_answers_have_no_favourite_place(tmp_path):
  answers = []
  for seed in range(5):
    world.write(tmp_path, seed=seed, people=40, train=1)
    answers += [question.answer for question in _questions(tmp_path, 'test')]
  # Four standard deviations of a count of 400 answers at 1/4.
  assert all(abs(answers.count(place) - 100) < 4 * (400 * 3 / 16) ** 0.5 for place in range(world.CHOICES))


@pytest.mark.parametrize(
  ('name', 'value'), [('people', 0), ('people', 71), ('values', 3), ('values', 71), ('train', 0), ('heldout', 0)]
)
def test_impossible_worlds_are_refused(tmp_path, name, value):
  with pytest.raises(ValueError, match=f'{name} = {value}'):
    world.write(tmp_path, **{name: value})

"""GLUE: its files and the hub's, its measures, how sentences are framed, and what is refused."""

import gzip
import json
import re

import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest
import small_bert

from qalora_jax import build
from qalora_jax import config as config_lib
from qalora_jax import tokenizer as tokenizer_lib
from qalora_jax.data import examples
from qalora_jax.data import glue
from qalora_jax.data import recipes
from qalora_jax.data import records
from qalora_jax.evaluate import tasks
from qalora_jax.evaluate.tasks import glue as measures

# One record of every task as GLUE's own files hold it: file, its lines, what is read.
FILES = {
  'sst2': ('train.tsv', ['sentence\tlabel', 'a "fine" film \t1'], ('a "fine" film ', None, 1.0)),
  'cola': ('train.tsv', ['gj04\t0\t*\tThe car honked.'], ('The car honked.', None, 0.0)),
  'mrpc': (
    'train.tsv',
    ['\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String', '1\t1\t2\tHe said so.\t"So he said.\r'],
    ('He said so.', '"So he said.', 1.0),
  ),
  'rte': ('train.tsv', ['index\tsentence1\tsentence2\tlabel', '0\tA\tB\tnot_entailment'], ('A', 'B', 1.0)),
  'qnli': ('train.tsv', ['index\tquestion\tsentence\tlabel', '0\tWho?\tHe.\tentailment'], ('Who?', 'He.', 0.0)),
  'qqp': (
    'train.tsv',
    ['id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate', '7\t1\t2\tWhy?\tWhy not?\t0'],
    ('Why?', 'Why not?', 0.0),
  ),
  'stsb': (
    'train.tsv',
    [
      'index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore',
      '0\tmain\tMSRvid\t2012\t1\tnone\tnone\tA plane.\tA bird.\t3.800',
    ],
    ('A plane.', 'A bird.', 3.8),
  ),
  'mnli': (
    'train.tsv',
    [
      'index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\tsentence2_parse'
      '\tsentence1\tsentence2\tlabel1\tgold_label',
      '0\t1\t1n\tfiction\t(\t(\t(\t(\tOne.\tTwo.\tneutral\tcontradiction',
    ],
    ('One.', 'Two.', 2.0),
  ),
}
HUB = {
  'sst2': ({'sentence': 'fine', 'label': 1, 'idx': 0}, ('fine', None, 1.0)),
  'cola': ({'sentence': 'Fine.', 'label': 0, 'idx': 0}, ('Fine.', None, 0.0)),
  'mrpc': ({'sentence1': 'A', 'sentence2': 'B', 'label': 0, 'idx': 3}, ('A', 'B', 0.0)),
  'rte': ({'sentence1': 'A', 'sentence2': 'B', 'label': 1, 'idx': 3}, ('A', 'B', 1.0)),
  'qnli': ({'question': 'A', 'sentence': 'B', 'label': 1, 'idx': 3}, ('A', 'B', 1.0)),
  'qqp': ({'question1': 'A', 'question2': 'B', 'label': 1, 'idx': 3}, ('A', 'B', 1.0)),
  'stsb': ({'sentence1': 'A', 'sentence2': 'B', 'label': 2.5, 'idx': 3}, ('A', 'B', 2.5)),
  'mnli': ({'premise': 'A', 'hypothesis': 'B', 'label': 2, 'idx': 3}, ('A', 'B', 2.0)),
}
LABELS = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=2, max_size=40)
NUMBERS = st.lists(st.tuples(st.integers(-9, 9), st.integers(-9, 9)), min_size=2, max_size=40)


def written(folder, name, lines):
  folder.mkdir(parents=True, exist_ok=True)
  (folder / name).write_text('\n'.join(lines) + '\n', encoding='utf-8')
  return folder / name


@pytest.mark.parametrize('task', FILES)
def test_glues_own_files_are_read(tmp_path, task):
  """By file, by its directory, and by that of all tasks; the recipe says the format."""
  name, lines, expected = FILES[task]
  path = written(tmp_path / glue.TASKS[task].folder, name, lines)
  for place in (path, path.parent, tmp_path):
    assert records.read(recipes.resolve(records.Source(recipe=task, path=str(place)))) == [records.Labelled(*expected)]


@pytest.mark.parametrize('task', HUB)
@pytest.mark.parametrize('form', ['jsonl', 'parquet'])
def test_the_hubs_records_are_read(tmp_path, task, form):
  record, expected = HUB[task]
  path = tmp_path / f'train-00000-of-00001.{form}'
  if form == 'parquet':
    table = pytest.importorskip('pyarrow')
    from pyarrow import parquet

    parquet.write_table(table.Table.from_pylist([record]), path)
  else:
    path.write_text(json.dumps(record) + '\n')
  assert records.read(records.Source(path=str(path), format=task)) == [records.Labelled(*expected)]


def test_the_other_names_of_parts(tmp_path):
  """MRPC as Microsoft names it, MNLI's two dev parts, the hub's files in a directory."""
  _, lines, expected = FILES['mrpc']
  path = written(tmp_path / 'a', 'msr_paraphrase_test.txt', lines)
  # That of GLUE has no labels.
  written(tmp_path / 'a', 'test.tsv', ['index\t#1 ID\t#2 ID\t#1 String\t#2 String', '0\t1\t2\tA\tB'])
  assert glue.read(glue.TASKS['mrpc'], str(path.parent), 'test') == [expected]
  # Microsoft's train file holds what GLUE measures on.
  written(tmp_path / 'a', 'msr_paraphrase_train.txt', lines)
  with pytest.raises(FileNotFoundError, match='holds no train part of mrpc: looked for train.tsv and train-00000'):
    glue.read(glue.TASKS['mrpc'], str(path.parent))
  assert glue.on_hub(glue.TASKS['mnli'], 'validation').endswith('mnli/validation_matched-00000-of-00001.parquet')
  assert glue.on_hub(glue.TASKS['mnli-mismatched'], 'test').endswith('mnli/test_mismatched-00000-of-00001.parquet')
  for name, file in (('mnli', 'dev_matched.tsv'), ('mnli-mismatched', 'dev_mismatched.tsv')):
    _, lines, expected = FILES['mnli']
    written(tmp_path / 'glue' / 'MNLI', file, lines)
    (found,) = tasks.TASKS[name].documents(str(tmp_path), '')
    assert found == records.Labelled(*expected)
  written(tmp_path / 'mrpc', 'validation-00000-of-00001.parquet', [])
  assert glue.part(glue.TASKS['mrpc'], str(tmp_path), 'validation').endswith('mrpc/validation-00000-of-00001.parquet')


@pytest.mark.parametrize(
  'task, lines, said',
  [
    ('sst2', ['sentence\tlabel', 'good\t1', 'bad'], 'train.tsv:3: 1 columns, not the 2 of sentence, label'),
    ('sst2', ['sentence\tlabel', 'good\t2'], "train.tsv:2: label is '2'; it must be 0 to 1"),
    ('sst2', ['index\tsentence', '0\tgood'], 'train.tsv:2: a record of sst2 holds sentence, label; this one has index'),
    ('sst2', ['sentence\tlabel', ' \t1'], 'train.tsv:2: sentence is empty'),
    ('sst2', ['sentence\tlabel'], 'no document in it'),
    ('rte', [*FILES['rte'][1], '1\tA\tB\tmaybe'], "train.tsv:3: label is 'maybe'; it must be entailment, not_entail"),
    (
      'stsb',
      [FILES['stsb'][1][0], FILES['stsb'][1][1].replace('3.800', 'much')],
      "score is 'much'; it must be a number",
    ),
    ('cola', ['gj04\t0\tThe car honked.'], 'train.tsv:1: 3 columns, not the 4 of source, label, star, sentence'),
  ],
)
def test_what_does_not_fit_is_named(tmp_path, task, lines, said):
  path = written(tmp_path, 'train.tsv', lines)
  with pytest.raises(ValueError, match=re.escape(said)):
    records.read(records.Source(path=str(path), format=task))


def test_a_directory_has_parts(tmp_path):
  """A set that trains reads one, a set that validates another, of a directory as of the hub."""
  for part, file in (('train', 'train.tsv'), ('validation', 'dev.tsv')):
    written(tmp_path / 'SST-2', file, ['sentence\tlabel', f'{part}\t1'])
  config = config_lib.default()
  for part in ('train', 'validation'):
    spec = config.data[part]
    spec.update(recipe='sst2', path=str(tmp_path))
    assert records.read(build.source(spec)) == [records.Labelled(part, None, 1.0)]
    spec.path = ''
    assert build.source(spec).path.endswith(f'sst2/{part}-00000-of-00001.parquet')
  with pytest.raises(ValueError, match="data.validation.part = 'dev': must be one of 'train', 'validation', 'test'"):
    config.data.validation.part = 'dev'
    config_lib.check(config)


def test_what_qqp_is_known_for_is_read(tmp_path, capsys):
  """Some lines of the published file have too few columns, some questions are empty."""
  lines = [*FILES['qqp'][1], '97931\t1\t2', '8\t1\t2\tWhy?\t\t1']
  path = written(tmp_path, 'train.tsv', lines)
  expected = [('Why?', 'Why not?', 0.0), ('Why?', '', 1.0)]
  assert glue.read(glue.TASKS['qqp'], str(path)) == expected
  assert '1 lines of other than 6 columns are left out' in ' '.join(capsys.readouterr().out.split())
  path.with_suffix('.tsv.gz').write_bytes(gzip.compress(path.read_bytes()))
  assert glue.read(glue.TASKS['qqp'], str(path.with_suffix('.tsv.gz'))) == expected


def test_a_part_that_is_not_there_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match=r'holds no validation part of sst2: looked for dev.tsv and validation-'):
    tasks.TASKS['sst2'].documents(str(tmp_path), '')
  with pytest.raises(ValueError, match=r'label is -1; it must be 0 to 1 \(-1 stands for labels that GLUE keeps'):
    glue._parsed(glue.TASKS['sst2'], {'sentence': 'good', 'label': -1}, 'a')
  # The hub's test part of STS-B has it everywhere.
  with pytest.raises(ValueError, match=r'label is -1.0; it must be a number from 0 to 5 \(-1 stands for labels'):
    glue._parsed(glue.TASKS['stsb'], {'sentence1': 'A', 'sentence2': 'B', 'label': -1.0}, 'a')


def test_the_published_files(assets):
  counts = {'SST-2': (60_614, 6_735, 872), 'MRPC': (3_668, 408)}
  for folder, expected in counts.items():
    task = next(task for task in glue.TASKS.values() if task.folder == folder)
    parts = ('train', 'validation', 'test')[: len(expected)]
    found = [glue.read(task, glue.part(task, str(assets), part)) for part in parts]
    assert tuple(map(len, found)) == expected
    assert {label for part in found for *_, label in part} == {0.0, 1.0}


@hypothesis.given(LABELS)
@hypothesis.settings(deadline=None)
def test_measures_of_classes_are_sklearns(pairs):
  metrics = pytest.importorskip('sklearn.metrics')
  predicted, labels = map(list, zip(*pairs, strict=True))
  assert measures.accuracy(predicted, labels) == pytest.approx(metrics.accuracy_score(labels, predicted))
  # Where nothing is positive both are 0; sklearn says so with a warning unless told.
  assert measures.f1(predicted, labels) == pytest.approx(metrics.f1_score(labels, predicted, zero_division=0.0))
  if len(set(predicted)) > 1 and len(set(labels)) > 1:
    expected = metrics.matthews_corrcoef(labels, predicted)
    assert measures.matthews(predicted, labels) == pytest.approx(expected, abs=1e-12)


@hypothesis.given(NUMBERS)
@hypothesis.settings(deadline=None)
def test_measures_of_numbers_are_scipys(pairs):
  stats = pytest.importorskip('scipy.stats')
  predicted, labels = map(list, zip(*pairs, strict=True))
  hypothesis.assume(len(set(predicted)) > 1 and len(set(labels)) > 1)
  assert measures.pearson(predicted, labels) == pytest.approx(stats.pearsonr(predicted, labels)[0], abs=1e-9)
  assert measures.spearman(predicted, labels) == pytest.approx(stats.spearmanr(predicted, labels)[0], abs=1e-9)


def test_constant_predictions_have_a_measure():
  """No correlation with anything, and no true positive."""
  for measure in (measures.matthews, measures.pearson, measures.spearman):
    assert measure([0, 0, 0], [0, 1, 1]) == measure([0, 1, 1], [1, 1, 1]) == 0.0
  assert measures.f1([0, 0], [0, 0]) == measures.f1([0, 0], [1, 1]) == 0.0
  assert measures.f1([1, 1], [1, 1]) == measures.accuracy([1], [1]) == 1.0


def test_tasks_give_glues_measures():
  outputs = np.array([[0.0, 1.0], [1.0, 0.0], [0.0, 2.0], [3.0, 0.0]])
  found = tasks.TASKS['mrpc'].metrics(outputs, [1.0, 0.0, 0.0, 0.0])
  assert found == {'accuracy': 0.75, 'f1': pytest.approx(2 / 3), 'standard_error': pytest.approx(np.sqrt(0.1875 / 4))}
  assert tasks.TASKS['cola'].metrics(outputs, [1.0, 0.0, 1.0, 0.0]) == {'matthews': pytest.approx(1.0)}
  found = tasks.TASKS['stsb'].metrics(np.array([[1.0], [2.0], [10.0]]), [0.0, 1.0, 2.0])
  assert found['spearman'] == pytest.approx(1.0) and found['pearson'] < 0.95
  assert set(glue.TASKS) <= set(tasks.TASKS)
  with pytest.raises(ValueError, match='sst2: the model gives out NaN or infinity'):
    tasks.TASKS['sst2'].metrics(np.array([[np.nan, 1.0]]), [1.0])


@pytest.fixture(scope='module')
def words(tmp_path_factory):
  return small_bert.words(tmp_path_factory.mktemp('words'))


@hypothesis.given(
  st.lists(st.sampled_from(small_bert.WORDS), max_size=12),
  st.none() | st.lists(st.sampled_from(small_bert.WORDS), min_size=1, max_size=12),
  st.integers(3, 24),
)
@hypothesis.settings(max_examples=60, deadline=None)
def test_sentences_are_framed_and_cut_as_transformers_does(words, first, second, limit):
  transformers = pytest.importorskip('transformers')
  theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(words / 'tokenizer.json'))
  first, second = ' '.join(first), None if second is None else ' '.join(second)
  expected = theirs(first, second, truncation='longest_first', max_length=limit, return_token_type_ids=True)
  ours = tokenizer_lib.load(words).framed(first, second, limit)
  assert (ours.ids, ours.types) == (expected['input_ids'], expected['token_type_ids'])
  assert ours.cut == len(theirs(first, second)['input_ids']) - len(ours.ids)
  assert tokenizer_lib.load(words).framed(first, second, 0).cut == 0


def test_a_labelled_sentence_as_an_example(words):
  loaded = tokenizer_lib.load(words)
  document = records.Labelled('good film', 'bad film', 2.0)
  (found,) = examples.encode(document, loaded, window=16, loss_on='completion', append_eos=True, overflow='cut')
  cls, sep, good, film, bad = (small_bert.VOCABULARY.index(word) for word in ('[CLS]', '[SEP]', 'good', 'film', 'bad'))
  assert found['tokens'].tolist() == [cls, good, film, sep, bad, film, sep]
  assert found['types'].tolist() == [0, 0, 0, 0, 1, 1, 1]
  assert found['loss_mask'].tolist() == [1, 0, 0, 0, 0, 0, 0] and found['labels'].tolist() == [2.0, 0, 0, 0, 0, 0, 0]
  assert found['labels'].dtype == np.float32
  with pytest.raises(ValueError, match=r'is 2 tokens longer than the window of 5: raise it'):
    examples.encode_labelled(document, loaded, window=5, cuts=False)
  assert len(examples.encode_labelled(document, loaded, window=5, cuts=True)['tokens']) == 5


def test_a_tokenizer_without_marks_frames_nothing(source):
  loaded = tokenizer_lib.load(source)
  assert loaded.framed is None
  with pytest.raises(ValueError, match=r'between \[CLS\] and \[SEP\]; the tokenizer has no such marks'):
    examples.encode_labelled(records.Labelled('good', None, 1.0), loaded, window=8, cuts=True)

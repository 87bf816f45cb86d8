"""Data sets that papers fine-tune on, by name: which file of the hub, in which format, written how.

The settings are those of QLoRA's released code (artidoro/qlora, qlora.py), whose data sets QA-LoRA's code shares.  Two
things are left to the config: how long a window is (the papers cut a prompt at 1024 tokens and a completion at 256:
data.max_prompt, data.max_completion), and how many documents count (QA-LoRA's 320K of FLAN v2: sample).  Prompts of
Alpaca end in `### Response:`, as in Stanford's code; QLoRA's copy of the template puts a space after it.

A file of `@refs/convert/parquet` is the hub's own conversion of all files of a split into one.
"""

import dataclasses
import difflib

from qalora_jax.data import glue
from qalora_jax.data import records

# What a recipe decides, where the source has the default of `records.Source`.
_SETTINGS = ('format', 'template', 'overflow')


@dataclasses.dataclass(frozen=True)
class Recipe:
  """One data set.

  `path` is its file on the hub, '' where no single file of the hub holds it; `documents` how many are in that file,
  0 where it is not one file; `found` where else the data are, and what they are.
  """

  name: str
  path: str
  documents: int
  paper: str
  found: str
  format: str = 'jsonl'
  template: str = 'plain'
  overflow: str = 'split'


RECIPES = {
  recipe.name: recipe
  for recipe in (
    Recipe(
      'alpaca',
      'hf://datasets/tatsu-lab/alpaca/data/train-00000-of-00001-a09b74b3ef9c3b56.parquet',
      52_002,
      'Taori et al., 2023 (Stanford Alpaca)',
      'alpaca_data.json of github.com/tatsu-lab/stanford_alpaca',
      format='alpaca',
      template='alpaca',
    ),
    Recipe(
      'alpaca-clean',
      'hf://datasets/yahma/alpaca-cleaned/alpaca_data_cleaned.json',
      51_760,
      'Ruebsamen, 2023 (AlpacaDataCleaned)',
      'alpaca_data_cleaned.json of github.com/gururise/AlpacaDataCleaned',
      format='alpaca',
      template='alpaca',
    ),
    Recipe(
      'flan-v2',
      '',
      0,
      'Longpre et al., 2023 (the Flan Collection)',
      'what you choose of its submixtures cot, flan2021 (Muffin), t0 (T0-SF) and niv2, as google-research/FLAN writes '
      'them or Open-Orca/FLAN of the hub holds them in many files, joined into one of records of inputs and targets '
      '(or prompt and completion), with task_name (or task, or template) where task or per_task is set',
    ),
    Recipe(
      'oasst1',
      'hf://datasets/timdettmers/openassistant-guanaco/openassistant_best_replies_train.jsonl',
      9_846,
      "Köpf et al., 2023 (OpenAssistant); Dettmers et al., 2023 (QLoRA's Guanaco: best replies, learnt whole)",
      'records of text (`### Human: ...### Assistant: ...`, learnt whole), or of input and output (the output learnt)',
      overflow='cut',
    ),
    Recipe(
      'self-instruct',
      'hf://datasets/yizhongw/self_instruct@refs/convert/parquet/self_instruct/train/0000.parquet',
      82_612,
      'Wang et al., 2023 (Self-Instruct)',
      'data/gpt3_generations/batch_221203/all_instances_82K.jsonl (format alpaca) or data/seed_tasks.jsonl (format '
      'instances) of github.com/yizhongw/self-instruct',
    ),
    Recipe(
      'longform',
      'hf://datasets/akoksal/LongForm@refs/convert/parquet/default/train/0000.parquet',
      23_652,
      'Köksal et al., 2023 (LongForm)',
      'dataset/train.json of github.com/akoksal/LongForm',
    ),
    Recipe(
      'chip2',
      'hf://datasets/laion/OIG/unified_chip2.jsonl',
      210_289,
      'LAION, 2023 (Open Instruction Generalist)',
      'unified_chip2.jsonl of OIG',
      format='chip2',
    ),
    Recipe(
      'hh-rlhf',
      'hf://datasets/Anthropic/hh-rlhf@refs/convert/parquet/default/train/0000.parquet',
      160_800,
      'Bai et al., 2022 (helpful and harmless; the preferred conversation, learnt whole)',
      "train.jsonl.gz of helpful-base, helpful-online, helpful-rejection-sampled or harmless-base of the hub's "
      'Anthropic/hh-rlhf, a part each',
      format='chosen',
      overflow='cut',
    ),
    Recipe(
      'unnatural-instructions',
      'hf://datasets/mrm8488/unnatural-instructions-full@refs/convert/parquet/default/train/0000.parquet',
      240_670,
      'Honovich et al., 2023 (Unnatural Instructions, with paraphrases)',
      'full_data.jsonl of github.com/orhonovich/unnatural-instructions, or core_data.jsonl, without paraphrases',
      format='instances',
    ),
    Recipe(
      'commonsense',
      '',
      0,
      'Hu et al., 2023 (LLM-Adapters)',
      'dataset/TASK/train.json of github.com/AGI-Edgerunners/LLM-Adapters, TASK such as boolq or ARC-Easy',
      format='alpaca',
      template='alpaca',
    ),
    Recipe(
      'e2e',
      '',
      0,
      'Novikova et al., 2017 (E2E NLG), as Hu et al., 2022 (LoRA) write it',
      'examples/NLG/data/e2e/train.txt of github.com/microsoft/LoRA, `meaning representation||text` a line',
      format='pairs',
    ),
  )
} | {
  task.name: Recipe(
    task.name,
    glue.on_hub(task, 'train'),
    task.documents,
    f'{task.paper}, of GLUE (Wang et al., 2019)',
    f'train.tsv of {task.folder} in the archive of gluebenchmark.com',
    format=task.name,
    # A sentence is longer than the window or it is not: what is left of it still has its label.
    overflow='cut',
  )
  for task in glue.TASKS.values()
}


def resolve(source: records.Source) -> records.Source:
  """The source with its recipe's settings in place of the name; as it is where it names none.

  What the source says counts before what the recipe says: a path (empty: the recipe's file on the hub), and format,
  template and overflow wherever they are not at the defaults of `records.Source`.  So a default cannot be asked for
  against a recipe that has something else: then name path and format, and no recipe.

  Raises ValueError for an unknown recipe, with the nearest name, and for one that has no file on the hub where the
  source has no path either, with what to fetch.
  """
  if not source.recipe:
    return source
  recipe = _recipe(source.recipe)
  if not (source.path or recipe.path):
    raise ValueError(
      f'recipe {recipe.name!r} ({recipe.paper}) has no single file on the hub: fetch {recipe.found}. Name the file '
      'by path (for training: data.train.path)'
    )
  plain = records.Source()
  own = {name: getattr(recipe, name) for name in _SETTINGS if getattr(source, name) == getattr(plain, name)}
  return dataclasses.replace(source, recipe='', path=source.path or _file(recipe, source.part), **own)


def needs(source: records.Source) -> str:
  """What must be there, or is downloaded, to read the source: 'hf://... (52,002 documents)', or its path."""
  resolved = resolve(source)
  if source.recipe and resolved.path == _recipe(source.recipe).path:
    return f'{resolved.path} ({_recipe(source.recipe).documents:,} documents)'
  return resolved.path


def _file(recipe: Recipe, part: str) -> str:
  """The recipe's file on the hub: of GLUE the part's."""
  return glue.on_hub(glue.TASKS[recipe.format], part) if recipe.format in glue.TASKS else recipe.path


def _recipe(name: str) -> Recipe:
  if name in RECIPES:
    return RECIPES[name]
  close = difflib.get_close_matches(name, RECIPES, n=1)
  hint = f'; did you mean {close[0]!r}?' if close else ''
  raise ValueError(f'recipe {name!r} is unknown; there are {", ".join(RECIPES)}{hint}')

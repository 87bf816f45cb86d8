"""Question: on a real pretrained BERT and real tasks, what does each method keep of full fine-tuning, in what size?

MiniLM-L6 (configs/minilm.py) on SST-2 and MRPC.  Grid: full fine-tuning, LoRA, the head alone; QLoRA (NF4, double
quantization) as trained, and merged and quantized again; QA-LoRA at 4, 3 and 2 bits on a rounded base, on a GPTQ base
and on one with refined offsets; seeds 0, 1, 2.  All of a task see the same examples, equally often, 512 tokens a
step; the rates are those of configs/minilm.py.  At the end SST-2 once more, once through, by full fine-tuning.

    python -m experiments.glue [sst2 mrpc] [--data=DIRECTORY] [--seeds=1] [--limit=SECONDS] [--render]

Every run is a chain of `qalora` commands (`pipeline`), of which what is finished is not done again: cut short, or
stopped by --limit, the same command goes on, and what is measured so far is in the table.  Such commands side by side
share the rows among them; the table was made by two, each on a core of its own.  Writes runs/glue and
experiments/results/glue.{json,md,png}; --render only renders the last two.

Reads GLUE's own files below --data (default: those of the assets that configs/babyllama.py finds).  Both tasks are
scored on GLUE's dev part: the 872 sentences of SST-2, which that copy calls test, and the 408 pairs of MRPC.  That
copy's train part of SST-2 is nine tenths of GLUE's (60,614 sentences of 67,349); the rest, its dev part, is what rates
were chosen by.  The head is pooler and classifier: nothing ever trained MiniLM's pooler.

Read the table by task: `accuracy` and `f1` are means over seeds with the sample standard deviation; beside it a score
of one model has a standard error, of about 0.9 points on SST-2 and 1.7 on MRPC.  `bytes` are those of all weights that
are deployed, the embedding of 30,522 words among them (46.9 million bytes in float32, which no method here quantizes),
`bits per weight` those of the blocks' matrices with their adapters.  `seconds a step` are medians over a run's log, on
a machine that may do other work too.
"""

import argparse
from collections.abc import Iterator
import contextlib
import itertools
import json
import os
import pathlib
import re
import statistics
import time

import matplotlib

matplotlib.use('Agg')
from matplotlib import pyplot as plt

from configs import babyllama
from experiments import pipeline
from experiments import stages
from qalora_jax import lock
from qalora_jax import report

RUNS = pathlib.Path('runs/glue')
RESULTS = pathlib.Path('experiments/results/glue')
SEEDS, BITS = (0, 1, 2), (4, 3, 2)
# By task: the folder of its files, the part of these that is GLUE's dev part, its measures, steps.
TASKS = {
  'sst2': ('SST-2', 'test', ('accuracy',), 300),
  'mrpc': ('MRPC', 'validation', ('accuracy', 'f1'), 360),
}
WINDOWS = 64
GPTQ = {'base.method': 'gptq'}
BASES = {
  'RTN': {'base.method': 'affine'},
  'GPTQ': GPTQ,
  'GPTQ + refined offsets': GPTQ | {'base.refine': True},
}
SCORES = ('accuracy', 'f1')
# SST-2 once through, with one seed, to stand beside what is published for MiniLM.
WHOLE = ('full fine-tuning, one epoch', None, 'full', {'train.steps': 1600})


def grid() -> list[tuple[str, int | None, str, dict]]:
  """(method, bits, kind of recipe, overrides) of every row, what decides the question first."""
  rows = [
    ('full fine-tuning', None, 'full', {}),
    ('head alone', None, 'head', {}),
    ('LoRA, merged', None, 'lora', {'score': 'merged'}),
    ('QLoRA (NF4 + DQ)', 4, 'qlora', {'score': 'trained'}),
  ]
  for (name, base), bits in itertools.product(BASES.items(), BITS):
    rows.append((f'QA-LoRA on {name}, merged', bits, 'qalora', base | {'base.bits': bits}))
  for bits in BITS:
    again = {'then.base.method': 'gptq', 'then.base.bits': bits, 'then.base.group': 32, 'then.base.double': False}
    rows.append(('QLoRA, merged, GPTQ', bits, 'qlora', again))
    rows.append(('QLoRA, merged, RTN', bits, 'qlora', again | {'then.base.method': 'affine'}))
  return rows


def planned(tasks: list[str], seeds: tuple[int, ...]) -> Iterator[tuple[int, str, tuple]]:
  """(seed, task, row) of every run: the whole grid with a seed before the next, then WHOLE."""
  yield from itertools.product(seeds, tasks, grid())
  if 'sst2' in tasks:
    yield SEEDS[0], 'sst2', WHOLE


def run(task: str, row: tuple[str, int | None, str, dict], seed: int, data: pathlib.Path) -> tuple[str, dict]:
  """(recipe, overrides) of a row of `grid` with this seed, as `pipeline` takes them."""
  _, _, kind, overrides = row
  folder, part, _, steps = TASKS[task]
  steps = overrides.get('train.steps', steps)
  place = data / folder
  # What is calibrated, and all that shares its training with such a row: a base is named by all of its config.
  looks = kind == 'qlora' or overrides.get('base.method') == 'gptq'
  settings = {
    'seed': seed,
    'train.steps': steps,
    'train.checkpoint_every': steps,
    'optim.warmup_steps': steps // 10,
    'data.train.path': str(place / 'train.tsv'),
    # The last scoring alone, of the part that no method is chosen by.
    'data.validation.path': '',
    'data.validation.recipe': '',
    'calibration.text.path': str(place / 'train.tsv') if looks else '',
    'calibration.text.recipe': task if looks else '',
    'calibration.length': 128,
    'calibration.samples': WINDOWS,
    'evaluate.tasks': task,
    'evaluate.data': str(data),
    'evaluate.split': part,
  }
  return f'configs/{kind}_minilm_{task}.py', settings | overrides


def measure(task: str, row: tuple[str, int | None, str, dict], seed: int, data: pathlib.Path) -> dict:
  """What became of a row of `grid` with this seed."""
  recipe, overrides = run(task, row, seed, data)
  found = pipeline.result(recipe, overrides, RUNS)
  log = pipeline.training(recipe, overrides, RUNS) / 'metrics.jsonl'
  steps_took = [line['seconds_per_step'] for line in map(json.loads, log.read_text().splitlines()) if 'loss' in line]
  return {
    'task': task, 'method': row[0], 'bits': row[1], 'seed': seed,
    **{name: found[f'{task}/{name}'] for name in TASKS[task][2]}, 'bytes': found['bytes'],
    'bits_per_weight': found['bits_per_weight'], 'trained_parameters': found['trained_parameters'],
    'seconds_per_step': statistics.median(steps_took), 'steps': overrides['train.steps'],
  }  # fmt: skip


def stored() -> dict[tuple, dict]:
  """{(task, method, bits, seed): row} of what is measured so far."""
  file = RESULTS.with_suffix('.json')
  rows = json.loads(file.read_text())['rows'] if file.is_file() else []
  return {(row['task'], row['method'], row['bits'], row['seed']): row for row in rows}


def store(row: dict) -> None:
  """Adds a row to those that are stored, by this process and by those side by side."""
  file = RESULTS.with_suffix('.json')
  with pipeline.alone(RUNS / file.name):
    report.write(file, report.document('python -m experiments.glue', [*stored().values(), row]))


@contextlib.contextmanager
def claimed(task: str, row: tuple, seed: int) -> Iterator[bool]:
  """Whether this process is the one that measures a row, of those side by side."""
  place = RUNS / 'claims'
  place.mkdir(parents=True, exist_ok=True)
  with lock.taken(place / re.sub('[^a-z0-9]+', '-', f'{task} {row[0]} {row[1]} {seed}'.lower())) as mine:
    yield mine


def summary(rows: list[dict]) -> list[dict]:
  """Mean and spread (sample standard deviation over seeds) of every cell, in the order of `grid`."""
  cells = {}
  for row in rows:
    cells.setdefault((row['task'], row['method'], row['bits']), []).append(row)
  order = [(task, method, bits) for task in TASKS for method, bits, *_ in (*grid(), WHOLE)]
  table = []
  for key in sorted(cells, key=order.index):
    task, method, bits = key
    own = cells[key]
    row = {'task': task, 'method': method, 'bits': bits, 'seeds': len(own)}
    for name in SCORES:
      values = [one[name] for one in own if name in one]
      if values:
        spread = f' ± {statistics.stdev(values):.4f}' if len(values) > 1 else ''
        row[name] = f'{statistics.mean(values):.4f}{spread}'
    table.append(
      row
      | {
        'trained parameters': own[0]['trained_parameters'],
        'bits per weight': round(own[0]['bits_per_weight'], 2),
        'bytes': own[0]['bytes'],
        'seconds a step': statistics.median(one['seconds_per_step'] for one in own),
      }
    )
  return table


def render() -> None:
  """The table and the plot of the stored results."""
  content = json.loads(RESULTS.with_suffix('.json').read_text())
  rows = content['rows']
  commits = sorted({row['commit'] for row in rows})
  head = f'`{content["command"]}`, commits {", ".join(commits)}, {content["date"]}, {content["machine"]}\n\n'
  table = summary(rows)
  RESULTS.with_suffix('.md').write_text(head + report.markdown(table))
  draw(rows)
  report.show('glue', table)


def draw(rows: list[dict]) -> None:
  """Accuracy by bits, a panel a task; what has no bits of its own is a line across."""
  tasks = [task for task in TASKS if any(row['task'] == task for row in rows)]
  figure, panels = plt.subplots(1, len(tasks), figsize=(7 * len(tasks), 5), squeeze=False)
  for panel, task in zip(panels[0], tasks, strict=True):
    own = [row for row in rows if row['task'] == task]
    for method in dict.fromkeys(row['method'] for row in own):
      cells = {}
      for row in own:
        if row['method'] == method:
          cells.setdefault(row['bits'], []).append(row['accuracy'])
      if len(cells) == 1:
        (values,) = cells.values()
        panel.axhline(statistics.mean(values), linestyle=':', label=method, color=f'C{len(panel.lines)}')
        continue
      means = [statistics.mean(values) for values in cells.values()]
      spreads = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in cells.values()]
      style = '-' if method.startswith('QA') else '--'
      panel.errorbar(list(cells), means, yerr=spreads, label=method, capsize=3, marker='o', linestyle=style)
    panel.set(title=task, xlabel='bits per code (group 32)', ylabel='accuracy', xticks=BITS)
    panel.invert_xaxis()
    panel.legend(fontsize=7)
  figure.tight_layout()
  # No date and no version of a program: the same rows make the same file.
  figure.savefig(RESULTS.with_suffix('.png'), dpi=120, metadata={'Software': None})
  plt.close(figure)


def main() -> None:
  """Measures the tasks named on the command line (all by default), stores the rows, renders."""
  os.chdir(pathlib.Path(__file__).resolve().parents[1])
  parser = argparse.ArgumentParser(prog='python -m experiments.glue', description=__doc__.partition('\n\n')[0])
  parser.add_argument('tasks', nargs='*', default=[], metavar='TASK', help=f'of {", ".join(TASKS)}; default: all')
  parser.add_argument('--data', type=pathlib.Path, default=babyllama.ASSETS / 'glue', help="where GLUE's files are")
  parser.add_argument('--seeds', type=int, default=len(SEEDS), help='so many of them, the first ones')
  parser.add_argument('--limit', type=float, default=float('inf'), help='seconds after which no run begins')
  parser.add_argument('--render', action='store_true', help='run nothing')
  asked = parser.parse_args()
  if unknown := set(asked.tasks) - set(TASKS):
    parser.error(f'no task {sorted(unknown)[0]!r}; there are {", ".join(TASKS)}')
  if not asked.render:
    stages.remember_compilations(RUNS / 'compiled')
    until, commit = time.monotonic() + asked.limit, report.commit()
    for seed, task, own in planned(asked.tasks or list(TASKS), SEEDS[: asked.seeds]):
      if time.monotonic() > until:
        break
      with claimed(task, own, seed) as mine:
        if mine and (task, own[0], own[1], seed) not in stored():
          store(measure(task, own, seed, asked.data.resolve()) | {'commit': commit})
  render()


if __name__ == '__main__':
  stages.script(main)

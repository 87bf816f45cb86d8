"""Question: on a real pretrained BERT, what do the methods reach on GLUE, and with how many bytes?

MiniLM-L6 (configs/minilm.py) on SST-2 and MRPC.  Grid: full fine-tuning; LoRA; QLoRA (NF4, double quantization) as
trained, and merged and quantized again by rounding and by GPTQ with refined offsets; QA-LoRA on bases by rounding,
GPTQ, and GPTQ with refined offsets; bits 4, 3, 2, groups of 32; the classifier alone on the untouched base; seeds 0, 1,
2.
Calibrated on the training sentences of the task.

    python -m experiments.glue [sst2 mrpc] [--steps=1500] [--seeds=3] [--only=QA-LoRA] [--render]

Every stage is a `qalora` command; what is finished is not run again.  --steps=40 --seeds=1 goes through everything in
minutes.  Reads glue/SST-2 and glue/MRPC of QALORA_ASSETS, whose SST-2/test.tsv is GLUE's dev part; writes runs/glue and
experiments/results/glue.{json,md,png}.  --render only renders the last two.
Read it by task: accuracy (and F1) on GLUE's dev part, which nothing was chosen on, against bytes of the deployed model.
MiniLM-L6's authors report 92 on SST-2 after fine-tuning of all weights on the whole train part, several epochs.
"""

import argparse
import json
import os
import pathlib
import re
import statistics

import matplotlib

matplotlib.use('Agg')
from matplotlib import pyplot as plt

from experiments import pipeline
from experiments import stages
from qalora_jax import report

ASSETS = pathlib.Path(
  os.environ.get('QALORA_ASSETS', pathlib.Path(__file__).resolve().parents[2] / 'shared' / 'assets')
)
RUNS = pathlib.Path('runs/glue')
RESULTS = pathlib.Path('experiments/results/glue')
BITS = (4, 3, 2)
# By task: its folder, the part of these files that is GLUE's dev part, its measures.
TASKS = {'sst2': ('SST-2', 'test', ('accuracy',)), 'mrpc': ('MRPC', 'validation', ('accuracy', 'f1'))}
_RTN, _GPTQ = {'base.method': 'affine'}, {'base.method': 'gptq'}
_BASES = {'RTN': _RTN, 'GPTQ': _GPTQ, 'GPTQ + refined': _GPTQ | {'base.refine': True}}


def methods() -> dict[str, tuple[str, dict]]:
  """{method: (kind of the recipe, overrides)}."""
  made = {
    'full fine-tuning': ('full', {}),
    'LoRA': ('lora', {}),
    'head only': ('head', {}),
    'QLoRA (NF4 + DQ)': ('qlora', {}),
  }
  for bits in BITS:
    for name, base in _BASES.items():
      made[f'QA-LoRA, {name}, {bits} bits'] = ('qalora', base | {'base.bits': bits, 'base.group': 32})
    for name in ('RTN', 'GPTQ + refined'):
      again = {f'{pipeline.THEN}{key}': value for key, value in _BASES[name].items()}
      form = {'base.bits': bits, 'base.group': 32, 'base.double': False}
      again |= {f'{pipeline.THEN}{key}': value for key, value in form.items()}
      made[f'QLoRA, merged, {name}, {bits} bits'] = ('qlora', again)
  return made


def common(task: str, steps: int, seed: int) -> dict:
  """What all runs of a task say."""
  folder, split, _ = TASKS[task]
  train = str(ASSETS / 'glue' / folder / 'train.tsv')
  return {
    'seed': seed,
    'data.train.path': train,
    # Nothing is chosen by it here.
    'data.validation.recipe': '',
    'data.validation.path': '',
    'train.steps': steps,
    'train.checkpoint_every': steps,
    'optim.warmup_steps': max(steps // 20, 1),
    'calibration.text.recipe': task,
    'calibration.text.path': train,
    'calibration.samples': 64,
    'calibration.length': 128,
    'calibration.batch': 16,
    'evaluate.tasks': task,
    'evaluate.data': str(ASSETS),
    'evaluate.split': split,
  }


def measure(task: str, method: str, steps: int, seed: int) -> dict:
  """The row of one run."""
  kind, own = methods()[method]
  recipe, overrides = f'configs/{kind}_minilm_{task}.py', common(task, steps, seed) | own
  found = pipeline.result(recipe, overrides, RUNS)
  plain = {key: value for key, value in overrides.items() if not key.startswith(pipeline.THEN)}
  workdir, _ = pipeline.made(recipe, plain | {pipeline.SCORE: 'trained'}, RUNS)
  return {
    'task': task, 'method': method, 'seed': seed, 'steps': steps,
    **{name: found[f'{task}/{name}'] for name in TASKS[task][2]},
    'trained_parameters': found['trained_parameters'], 'bytes': found['bytes'],
    'bits_per_weight': found['bits_per_weight'], 'seconds_per_step': seconds_per_step(workdir),
  }  # fmt: skip


def seconds_per_step(workdir) -> float | None:
  """The median over a training's log of tokens in a full batch by tokens a second; None for one without two lines."""
  settings = json.loads((pathlib.Path(workdir) / 'config.json').read_text())
  lines = [json.loads(line) for line in (pathlib.Path(workdir) / 'metrics.jsonl').read_text().splitlines()]
  # The first has the compilation in it.
  speeds = [line['tokens_per_second'] for line in lines if 'tokens_per_second' in line][1:]
  return settings['train']['batch'] * settings['data']['window'] / statistics.median(speeds) if speeds else None


def summary(rows: list[dict]) -> list[dict]:
  """Mean and sample standard deviation over seeds of every cell, by task and growing bytes."""
  cells = {}
  for row in rows:
    cells.setdefault((row['task'], row['method']), []).append(row)
  table = []
  for (task, method), group in cells.items():
    line = {'task': task, 'method': method}
    for name in ('accuracy', 'f1'):
      values = [100 * row[name] for row in group if name in row]
      spread = f' ± {statistics.stdev(values):.1f}' if len(values) > 1 else ''
      line[name] = f'{statistics.fmean(values):.1f}{spread}' if values else None
    seconds = [row['seconds_per_step'] for row in group if row['seconds_per_step']]
    table.append(line | {
      'trained': group[0]['trained_parameters'], 'bytes': group[0]['bytes'],
      'bits per weight': round(group[0]['bits_per_weight'], 2),
      'seconds per step': round(statistics.median(seconds), 2) if seconds else None, 'seeds': len(group),
    })  # fmt: skip
  return sorted(table, key=lambda line: (line['task'], -line['bytes'], line['method']))


def render() -> None:
  """The table and the plot of the stored results."""
  content = json.loads(RESULTS.with_suffix('.json').read_text())
  rows = content['rows']
  head = f'`{content["command"]}`, commit {content["commit"]}, {content["date"]}, {content["machine"]}\n\n'
  RESULTS.with_suffix('.md').write_text(head + report.markdown(summary(rows)))
  tasks = list(dict.fromkeys(row['task'] for row in rows))
  figure, panels = plt.subplots(1, len(tasks), figsize=(7.5 * len(tasks), 5), squeeze=False)
  for panel, task in zip(panels[0], tasks, strict=True):
    lines = {}
    for row in rows:
      if row['task'] == task:
        # Methods that differ in their bits alone are one line.
        line = lines.setdefault(re.sub(r', \d bits$', '', row['method']), {})
        line.setdefault(row['bits_per_weight'], []).append(100 * row['accuracy'])
    panel.set_prop_cycle(color=plt.get_cmap('tab10').colors)
    for name, points in lines.items():
      at = sorted(points)
      spread = [statistics.stdev(points[x]) if len(points[x]) > 1 else 0.0 for x in at]
      panel.errorbar(at, [statistics.fmean(points[x]) for x in at], yerr=spread, label=name, capsize=3, marker='o')
    panel.set(title=task, xlabel="bits per weight of the blocks' matrices", ylabel='accuracy, %', xscale='log')
    panel.set_xticks([2, 4, 8, 16, 32], ['2', '4', '8', '16', '32'])
    panel.legend(fontsize=6)
  figure.tight_layout()
  figure.savefig(RESULTS.with_suffix('.png'), dpi=120)
  report.show('glue', summary(rows))


def main() -> None:
  """Measures the tasks named on the command line (all by default), stores the rows, renders."""
  os.chdir(pathlib.Path(__file__).resolve().parents[1])
  parser = argparse.ArgumentParser(prog='python -m experiments.glue', allow_abbrev=False)
  parser.add_argument('tasks', nargs='*', default=list(TASKS), help='sst2, mrpc')
  parser.add_argument('--steps', type=int, default=1500, help='Steps of every training.')
  parser.add_argument('--seeds', type=int, default=3, help='Seeds 0, 1, ... of every training.')
  parser.add_argument('--only', default='', help='Only methods whose names hold this.')
  parser.add_argument('--render', action='store_true', help='Only the table and the plot of what is stored.')
  asked = parser.parse_args()
  if unknown := [task for task in asked.tasks if task not in TASKS]:
    raise ValueError(f'no task {unknown[0]!r}; there are {", ".join(TASKS)}.')
  if not asked.render:
    stages.remember_compilations(RUNS / 'compiled')
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for seed in range(asked.seeds):
      for task in asked.tasks:
        for method in methods():
          if asked.only not in method:
            continue
          rows.append(measure(task, method, asked.steps, seed))
          # What is measured so far can be rendered should the rest be cut off.
          report.write(RESULTS.with_suffix('.json'), report.document('python -m experiments.glue', rows))
  render()


if __name__ == '__main__':
  stages.script(main)

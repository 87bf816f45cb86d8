"""Question: on how little hardware does QA-LoRA train LLaMA, and what limits a step there?

    python -m experiments.scaling [--only=TEXT] [--again] [--render]

Nothing is run and nothing is read: every row is `qalora plan` of a recipe of configs/, the real step compiled for
devices that are not here (rank 64, one row of 2,048 tokens a device, bfloat16, remat 'full', unless the row says
otherwise).

    models     LLaMA-7B, 13B, 33B, 65B at 4, 3, 2 bits in groups of 32, on the fewest chips that hold them (v6e: to 33B)
    headline   QLoRA's: 7B below 8 GB and 65B below 48 GB on one device; `options` say how
    window     7B at 4 bits with longer and longer rows
    mesh       65B at 4 bits on eight GPUs, divided in three ways
    thorough   TPU rows of `models` with all of the compiler's optimization, as training is compiled; the others are
               compiled with the least (`qalora plan --quick`), in a quarter of the time; memory differs by 1 to 3 %

Bytes are those of one device; `activations` hold all that lives within a step but the gradients.  `seconds` are
the least that a limit of the chip allows, not what a step takes.  Constants of groups are float32 in the recipes, so
that 4 bits in groups of 32 are 6 bits a weight; `options` with float16 constants make them 5.

Rows for TPUs need libtpu, rows for an H100 jax's CUDA plugin (`make test-aot-gpu` makes that environment): what the
interpreter at hand cannot compile is left as it was, and what is there already is not compiled again without --again.
A row on which the compiler gives up is said and left out.
Writes experiments/results/scaling.{json,md,png}.
"""

import argparse
from collections.abc import Iterator
import dataclasses
import json
import pathlib
import shlex
import sys

import jax
import matplotlib

if not __package__:
  sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from qalora_jax import config as config_lib
from qalora_jax import plan as plan_lib
from qalora_jax import report
from qalora_jax import topologies

matplotlib.use('Agg')
from matplotlib import pyplot as plt  # noqa: E402 - the backend is chosen first

PLACE = pathlib.Path(__file__).resolve().parent / 'results' / 'scaling'
MODELS = ('7b', '13b', '33b', '65b')
# From few to many chips: the first that holds the step is the row.
SLICES = {'v5e': ('v5e', 'v5e:2x2', 'v5e:2x4', 'v5e:4x4'), 'v6e': ('v6e', 'v6e:2x2', 'v6e:2x4'), 'h100': ('h100',)}
HALF, OFFLOADED = {'base.scale_dtype': 'float16'}, {'optim.offload': True, 'model.remat': 'offload'}
KINDS = ('weights', 'adapter', 'optimizer', 'gradients', 'activations', 'padding', 'program')
_SHOWN = (
  'question', 'model', 'bits', 'options', 'topology', 'mesh', 'rows', 'window', 'weights', 'adapter', 'optimizer',
  'gradients', 'activations', 'total', 'host', 'fits', 'flops', 'matrix_units_seconds', 'memory_seconds',
  'received', 'commit',
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
  """One row: a recipe with overrides on the first of `slices` that holds it, the weights over `axis`."""

  question: str
  model: str
  bits: int
  slices: tuple[str, ...]
  window: int = 2048
  axis: str = 'fsdp'
  options: tuple[tuple[str, object], ...] = ()
  quick: bool = True

  @property
  def key(self) -> str:
    options = ' '.join(f'{name}={value}' for name, value in self.options)
    words = self.question, self.model, self.bits, self.slices[0], self.window, self.axis, options
    return ' '.join(map(str, words)).strip()

  def config(self, devices: int):
    """The recipe for this many devices, one row on each of those that share the rows."""
    rows = 1 if self.axis == 'tensor' else devices
    return config_lib.override(
      config_lib.recipe(config_lib.ROOT / 'configs' / f'qalora_llama_{self.model}.py'),
      {
        'base.bits': self.bits,
        'data.window': self.window,
        'train.batch': rows,
        'train.accumulation': 1,
        'sharding.data': 1,
        f'sharding.{self.axis}': -1,
        **dict(self.options),
      },
    )


def cases() -> Iterator[Case]:
  """Every row in the order in which it stands."""
  for chip, slices in SLICES.items():
    # libtpu 0.0.52 aborts, and the process with it, on 65B divided over v6e chips.
    for model in MODELS if chip != 'v6e' else MODELS[:3]:
      for bits in (4, 3, 2):
        yield Case('models', model, bits, slices)
  for model, chip, options in (
    ('7b', 'h100', {}),
    ('7b', 'h100', HALF),
    ('65b', 'h100', HALF),
    ('65b', 'v5p', HALF | OFFLOADED | {'optim.state': 'int8'}),
  ):
    yield Case('headline', model, 4, (chip,), options=tuple(options.items()))
  for window in (512, 1024, 4096, 8192, 16384):
    yield Case('window', '7b', 4, ('h100',), window=window)
  for axis in ('data', 'fsdp', 'tensor'):
    yield Case('mesh', '65b', 4, ('h100:8',), axis=axis)
  for model in MODELS[:3]:
    yield Case('thorough', model, 4, SLICES['v5e'], quick=False)


def measure(case: Case) -> dict:
  """The row of a case."""
  for name in case.slices:
    topology = topologies.find(name)
    found = plan_lib.plan(case.config(topology.count), topology, quick=case.quick)
    if found.fits:
      break
  options = ', '.join(f'{name} = {value}' for name, value in case.options)
  about = {'question': case.question, 'model': case.model, 'bits': case.bits, 'options': options or None}
  return {'key': case.key, **about, **found.row(), 'sent': found.sent}


def render(rows: list[dict], command: str) -> None:
  """Writes the table, in GiB, and the plot of stored rows."""
  content = report.document(command, rows)
  report.write(PLACE.with_suffix('.json'), content)
  gibibytes = {*KINDS, 'total', 'host', 'batch'}
  shown = [{name: row[name] / 2**30 if name in gibibytes else row.get(name) for name in _SHOWN} for row in rows]
  head = f'`{command}`, {content["date"]}, {content["machine"]}; GiB of one device; commits beside the rows\n\n'
  PLACE.with_suffix('.md').write_text(head + report.markdown(shown))
  draw(rows, PLACE.with_suffix('.png'))


def draw(rows: list[dict], path: pathlib.Path) -> None:
  """What one device holds, by kind: models and bits on a chip a panel, then windows, then meshes."""
  panels = {chip: [r for r in rows if r['question'] == 'models' and r['topology'].startswith(chip)] for chip in SLICES}
  alike = [r for r in rows if r['question'] == 'models' and r['topology'] == 'h100:1' and r['model'] == '7b']
  windows = [r for r in rows if r['question'] == 'window'] + [r for r in alike if r['bits'] == 4]
  panels['window, 7B, 4 bits, h100'] = sorted(windows, key=lambda row: row['window'])
  panels['mesh, 65B, 4 bits, h100:8'] = [r for r in rows if r['question'] == 'mesh']
  figure, axes = plt.subplots(1, len(panels), figsize=(4.5 * len(panels), 4.5), squeeze=False)
  for axis, (title, own) in zip(axes[0], panels.items(), strict=True):
    names = [_name(row, title) for row in own]
    bottom = [0.0] * len(own)
    for kind in KINDS:
      heights = [row[kind] / 2**30 for row in own]
      axis.bar(names, heights, bottom=bottom, label=kind)
      bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    axis.set(title=title, ylabel='GiB a device')
    axis.tick_params(axis='x', rotation=90)
  axes[0][-1].legend(fontsize='small')
  figure.tight_layout()
  # No date and no version of a program: the same rows make the same file.
  figure.savefig(path, format='png', dpi=110, metadata={'Software': None})
  plt.close(figure)


def _name(row: dict, title: str) -> str:
  if title.startswith('window'):
    return f'{row["window"]:,}'
  if title.startswith('mesh'):
    return row['mesh']
  return f'{row["model"]} {row["bits"]} bits, {row["topology"].partition(":")[2]}'


def main(words: list[str] | None = None) -> None:
  """Compiles what is missing, and renders."""
  parser = argparse.ArgumentParser(
    prog='python -m experiments.scaling', allow_abbrev=False, epilog=__doc__.partition('\n\n')[2],
    description=__doc__.partition('\n\n')[0], formatter_class=argparse.RawDescriptionHelpFormatter,
  )  # fmt: skip
  parser.add_argument('--only', default='', metavar='TEXT', help='the rows whose key holds this text')
  parser.add_argument('--again', action='store_true', help='also rows that are there')
  parser.add_argument('--render', action='store_true', help='compile nothing')
  asked = parser.parse_args(words)
  jax.config.update('jax_platforms', 'cpu')
  command = shlex.join(['python', '-m', 'experiments.scaling', *sys.argv[1:]])
  file = PLACE.with_suffix('.json')
  stored = {row['key']: row for row in json.loads(file.read_text())['rows']} if file.is_file() else {}
  for case in cases():
    able = topologies.installed(topologies.find(case.slices[0]).chip.platform)
    if asked.render or not able or asked.only not in case.key or (case.key in stored and not asked.again):
      continue
    try:
      stored[case.key] = measure(case) | {'commit': report.commit()}
    except topologies.Refused as refused:
      print(f'{case.key}: {refused}', flush=True)
      continue
    print({name: stored[case.key].get(name) for name in _SHOWN}, flush=True)
    render([stored[case.key] for case in cases() if case.key in stored], command)
  if asked.render:
    render([stored[case.key] for case in cases() if case.key in stored], command)


if __name__ == '__main__':
  main()

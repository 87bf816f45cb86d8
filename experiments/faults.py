"""Question: what does a run lose that is killed at random moments, again and again?  Nothing, or this is an error.

    python -m experiments.faults [--kills=50] [--damages=5] [--seed=0] [--place=DIR] [--out=PATH]

`qalora train` fine-tunes a tiny LLaMA with QA-LoRA, a checkpoint every five steps: once undisturbed, and once killed by
SIGKILL at moments drawn from the seed, and started again by the same command until it is done.  A fifth of the kills
fall into the start, the others a random number of steps and a random time after the first step.  `--damages` of the
starts find the newest checkpoint harmed, as a failing disk would harm it: a file cut short, or a bit of it flipped.  In
the end weights, the optimizer's moments, the data's position and every number of metrics.jsonl but the clock's must be
equal bit for bit, every line there once and nothing left unfinished; else what differs is an error and exit status 1.

A row of the log is a kill: when after its start, where (`starting`: no step of this start was logged; `training`;
`saving`: a checkpoint was being written; `naming`: its digests were written, its name not yet given), the last step
that was logged by then, and the one that the start before it had gone on from.  A start is a fork of this process, in
which modules are loaded and nothing of JAX has begun: imports write nothing, and take longer than all the rest.
Writes experiments/results/faults.{md,json}; --place keeps the workdirs, in an empty or a new directory.
"""

import argparse
from collections.abc import Callable
import contextlib
import dataclasses
import json
import multiprocessing
import os
import pathlib
import random
import re
import shlex
import sys
import tempfile
import time

import jax
import numpy as np
import orbax.checkpoint as ocp

from experiments import stages
from qalora_jax import build
from qalora_jax import checkpoint
from qalora_jax import cli
from qalora_jax import report
from qalora_jax import train  # loaded before the forks

RESULTS = pathlib.Path(__file__).resolve().parent / 'results' / 'faults'
# Steps to go for every kill, more than a start does on the average; steps between checkpoints.
STEPS_A_KILL, EVERY = 24, 5
METRICS, PRINTED = 'metrics.jsonl', 'printed.txt'
_RECIPE = """\
from configs import base


def get_config():
  config = base.get_config()
  config.model.source = {model!r}
  config.base.update(method='affine', bits=4, group=16)
  config.adapter.update(kind='qalora', rank=4, alpha=8.0, dropout=0.1)
  config.data.train.update(path={text!r}, format='text', separator='\\n')
  config.data.window = 32
  config.train.update(steps={steps}, batch=4, log_every=1, checkpoint_every={every}, tensorboard=False)
  config.optim.update(learning_rate=0.001, clip=1.0, schedule='cosine', warmup_steps=8)
  return config
"""


@dataclasses.dataclass(frozen=True)
class Kill:
  """When a process is killed: `seconds` after its start, or after it has logged `steps` steps."""

  steps: int
  seconds: float


def draw(rng: random.Random, start: float) -> Kill:
  """A fifth within the `start` seconds that a process takes to its first step; the others later."""
  if rng.random() < 0.2:
    return Kill(0, rng.uniform(0, start))
  return Kill(rng.randint(1, 4 * EVERY), rng.uniform(0, 0.2))


def make(place: pathlib.Path, steps: int) -> pathlib.Path:
  """Text, a random model and the recipe of so many steps, all in `place`; returns the recipe."""
  from flax import linen as nn

  from qalora_jax import hf
  from qalora_jax import tokenizer
  from qalora_jax.models import decoder

  rng = np.random.default_rng(0)
  words = ('the', 'cat', 'dog', 'bird', 'sat', 'ran', 'on', 'under', 'mat', 'roof', 'moon', 'sea', 'today', 'again')
  lines = [' '.join(rng.choice(words, rng.integers(4, 10))) for _ in range(200)]
  (place / 'lines.txt').write_text('\n'.join(lines) + '\n')
  tokenizer.train_bpe(lines, 300, place / 'tokenizer')
  rows = tokenizer.load(place / 'tokenizer').vocab_size
  config = decoder.Config(rows, 32, 64, 2, 4, 2, max_position_embeddings=64, tie_word_embeddings=True)
  shapes = nn.unbox(jax.eval_shape(decoder.Decoder(config).init, jax.random.key(0), np.zeros((1, 4), np.int32)))[
    'frozen'
  ]
  weights = jax.tree.map(lambda leaf: rng.normal(0.02, 0.2, leaf.shape).astype(np.float32), shapes)
  hf.write(place / 'model', config, weights, tokenizer_from=place / 'tokenizer', bos=0, eos=1)
  said = dict(model=str(place / 'model'), text=str(place / 'lines.txt'), steps=steps, every=EVERY)
  (place / 'recipe.py').write_text(_RECIPE.format(**said))
  return place / 'recipe.py'


def fork(function: Callable, *arguments, log: pathlib.Path, compiled: pathlib.Path) -> multiprocessing.Process:
  """A process that is at function(*arguments); what it prints goes to the end of `log`."""

  def work():
    with log.open('a') as file:
      for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(file.fileno(), stream.fileno())
    jax.config.update('jax_platforms', 'cpu')
    stages.remember_compilations(compiled)
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
    function(*arguments)

  process = multiprocessing.get_context('fork').Process(target=work)
  process.start()
  return process


def logged(workdir: pathlib.Path) -> list[dict]:
  """The whole lines of metrics.jsonl, without the clock."""
  path = workdir / METRICS
  rows = [json.loads(line) for line in path.read_text().split('\n')[:-1]] if path.exists() else []
  return [{name: value for name, value in row.items() if name not in train.SPEEDS} for row in rows]


def last(workdir: pathlib.Path) -> int:
  """The last step that is logged, 0 without one."""
  rows = logged(workdir)
  return rows[-1]['step'] if rows else 0


def unfinished(workdir: pathlib.Path) -> dict[int, pathlib.Path]:
  """The checkpoints that are being written, or were when a process died, by inode."""
  found = {}
  for path in (workdir / build.CHECKPOINTS).glob('*.orbax-checkpoint-tmp*'):
    with contextlib.suppress(FileNotFoundError):
      found[path.stat().st_ino] = path
  return found


class Runs:
  """`qalora train` of one recipe in one workdir, as often as it takes."""

  def __init__(self, recipe: pathlib.Path, workdir: pathlib.Path, compiled: pathlib.Path):
    self.workdir, self._printed, self._compiled = workdir, workdir.with_suffix('.txt'), compiled
    self._words = ['train', f'--config={recipe}', f'--workdir={workdir}']

  def start(self) -> multiprocessing.Process:
    """A process that trains."""
    return fork(cli.main, self._words, log=self._printed, compiled=self._compiled)

  def finish(self) -> float:
    """Trains to the end; returns the seconds to the first step of this start."""
    begun, before, first = time.monotonic(), self._size(), None
    process = self.start()
    while process.is_alive():
      if first is None and self._size() != before:
        first = time.monotonic() - begun
      process.join(0.02)
    if process.exitcode:
      raise ValueError(f'a run ended with exit status {process.exitcode}:\n{self._printed.read_text()[-3000:]}')
    return first or 0.0

  def kill(self, kill: Kill) -> dict:
    """Starts, kills, and says where that was."""
    stale, size, said = unfinished(self.workdir), self._size(), len(self.printed('continuing from'))
    begun = time.monotonic()
    process = self.start()
    if kill.steps:
      # The first line after a start rewrites the file, without the lines after the checkpoint.
      while process.is_alive() and self._size() == size:
        time.sleep(0.005)
      goal = last(self.workdir) + kill.steps
      while process.is_alive() and last(self.workdir) < goal:
        time.sleep(0.005)
    process.join(kill.seconds)
    process.kill()
    process.join()
    if process.exitcode != -9:
      raise ValueError(f'ended by itself with exit status {process.exitcode}:\n{self._printed.read_text()[-3000:]}')
    seconds = time.monotonic() - begun
    writing = [path for inode, path in unfinished(self.workdir).items() if inode not in stale]
    if writing:
      where = 'naming' if any((path / checkpoint.DIGESTS).exists() for path in writing) else 'saving'
    else:
      where = 'starting' if self._size() == size else 'training'
    continued = self.printed(r'continuing from step (\d+)')[said:]
    return {
      'went_on_from': int(continued[0]) if continued else None,
      'seconds': round(seconds, 2), 'where': where, 'logged': last(self.workdir),
      'whole_checkpoint': max(checkpoint.steps(self.workdir / build.CHECKPOINTS), default=None),
    }  # fmt: skip

  def printed(self, pattern: str) -> list[str]:
    """What a pattern's group was in everything that was printed."""
    return re.findall(pattern, self._printed.read_text() if self._printed.exists() else '')

  def _size(self) -> tuple | None:
    with contextlib.suppress(FileNotFoundError):
      found = (self.workdir / METRICS).stat()
      return found.st_ino, found.st_size
    return None


def harm(rng: random.Random, checkpoints: pathlib.Path) -> str | None:
  """Cuts a file of the newest checkpoint short or flips a bit of it; None, and nothing, without one before it."""
  found = checkpoint.steps(checkpoints)
  if len(found) < 2:
    return None
  newest = checkpoints / str(found[0])
  names = [name for name, (size, _) in json.loads((newest / checkpoint.DIGESTS).read_text())['files'].items() if size]
  name = rng.choice(names)
  data = bytearray((newest / name).read_bytes())
  if rng.random() < 0.5:
    data, how = data[: len(data) // 2], 'cut short'
  else:
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    how = 'a bit flipped'
  (newest / name).write_bytes(data)
  return f'{found[0]}: {name.partition("/")[0]}, {how}'


def arrays(place: pathlib.Path):
  """The tree of arrays that orbax wrote there."""
  return ocp.StandardCheckpointer().restore(place)


def compare(disturbed: pathlib.Path, whole: pathlib.Path) -> None:
  """Raises ValueError, naming it, where two finished workdirs differ in what training left."""
  ends = [max(checkpoint.steps(place / build.CHECKPOINTS)) for place in (disturbed, whole)]
  if ends[0] != ends[1]:
    raise ValueError(f'the runs ended at steps {ends}')
  one, two = (place / build.CHECKPOINTS / str(ends[0]) for place in (disturbed, whole))
  for item in ('params', 'optimizer'):
    trees = [jax.tree.leaves_with_path(arrays(place / item)) for place in (one, two)]
    for (path, left), (_, right) in zip(*trees, strict=True):
      if np.asarray(left).tobytes() != np.asarray(right).tobytes():
        raise ValueError(f'{item}{jax.tree_util.keystr(path)} differs')
  if (one / 'data/metadata').read_text() != (two / 'data/metadata').read_text():
    raise ValueError("the data's positions differ")
  if logged(disturbed) != logged(whole):
    raise ValueError(f'{METRICS} differs')
  if left := unfinished(disturbed):
    raise ValueError(f'{list(left.values())} is left unfinished')


def disturb(place: pathlib.Path, kills: int, damages: int, seed: int) -> tuple[list[dict], dict]:
  """(a row for every kill, the sums) of a run below `place`; raises ValueError where anything is lost."""
  rng, steps = random.Random(seed), kills * STEPS_A_KILL
  compiled = place / 'compiled'
  maker = fork(make, place, steps, log=place / 'made.txt', compiled=compiled)
  maker.join()
  if maker.exitcode:
    raise ValueError((place / 'made.txt').read_text())
  calm, rough = (Runs(place / 'recipe.py', place / name, compiled) for name in ('undisturbed', 'disturbed'))
  calm.finish()  # which compiles
  begun, rows = time.monotonic(), []
  start, due, harmed = 3.0, [], 0
  for number in range(1, kills + 1):
    due += [number] if number * damages // kills > (number - 1) * damages // kills else []
    said = harm(rng, rough.workdir / build.CHECKPOINTS) if due else None
    if said:
      due.pop()
      harmed += 1
    row = rough.kill(draw(rng, start))
    rows.append({'kill': number, **row, 'harmed_before': said})
    print(rows[-1], flush=True)
    if row['where'] != 'starting':
      start = 0.5 * start + 0.5 * row['seconds']
  rough.finish()
  last_start = fork(compare, rough.workdir, calm.workdir, log=place / 'compared.txt', compiled=compiled)
  last_start.join()
  if last_start.exitcode:
    raise ValueError(f'something was lost: {(place / "compared.txt").read_text().strip().splitlines()[-1]}')
  found = rough.printed(r'warning: .*going on from step (\d+)')
  aside = len(list((rough.workdir / build.CHECKPOINTS / checkpoint.DAMAGED).glob('*')))
  if not len(found) == aside == harmed:
    raise ValueError(f'{harmed} checkpoints were harmed, {len(found)} found, {aside} set aside')
  places = [row['where'] for row in rows]
  return rows, {
    'kills': kills, **{f'kills_while_{name}': places.count(name) for name in sorted(set(places))},
    'restores': len(rough.printed('continuing from step')), 'harmed': harmed, 'found_and_set_aside': len(found),
    'steps': steps, 'steps_done_again': _again(rows),
    'seconds': round(time.monotonic() - begun), 'lost': 'nothing: weights, moments, position and metrics are bit-equal',
  }  # fmt: skip


def _again(rows: list[dict]) -> int:
  """The steps that were logged before a kill and done once more after it."""
  pairs = zip(rows, rows[1:], strict=False)
  return sum(max(0, one['logged'] - two['went_on_from']) for one, two in pairs if two['went_on_from'] is not None)


def main(words: list[str] | None = None) -> None:
  """Kills, compares, prints and stores."""
  parser = argparse.ArgumentParser(
    prog='python -m experiments.faults', allow_abbrev=False, epilog=__doc__.partition('\n\n')[2],
    description=__doc__.partition('\n\n')[0], formatter_class=argparse.RawDescriptionHelpFormatter,
  )  # fmt: skip
  parser.add_argument('--kills', type=int, default=50, metavar='N')
  parser.add_argument('--damages', type=int, default=5, metavar='N')
  parser.add_argument('--seed', type=int, default=0, metavar='N')
  parser.add_argument('--place', type=pathlib.Path, metavar='DIR')
  parser.add_argument('--out', type=pathlib.Path, default=RESULTS, metavar='PATH', help='without a suffix')
  asked = parser.parse_args(words)
  with contextlib.ExitStack() as stack:
    place = asked.place or pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
    place.mkdir(parents=True, exist_ok=True)
    if any(place.iterdir()):
      parser.error(f'argument --place: {place} is not empty')
    rows, sums = disturb(place.absolute(), asked.kills, asked.damages, asked.seed)
  words = sys.argv[1:] if words is None else words
  command = shlex.join(['python', '-m', 'experiments.faults', *words])
  report.publish(asked.out, 'kills', command, rows, **sums)
  print(sums)


if __name__ == '__main__':
  stages.script(main)

"""Question: what does a checkpoint cost the steps beside which it is written?

    python -m experiments.checkpointing [--width=512] [--layers=2] [--rounds=12] [--place=DIR] [--out=PATH]

LLaMA-7B's layers scaled to a width (experiments/bench_step.py) with random weights: QA-LoRA at 4 bits, whose state is
small, and all weights trained, whose state is three times the model.  A round is a few steps alone, then a checkpoint
by qalora_jax/checkpoint.py, digests included, with steps beside it until it has its name.  With s the step's time
alone in the round (the median of its steps), b the seconds for which saving holds the loop up, w the seconds until the
checkpoint is whole, and n the steps done meanwhile:

    held_up   b: the state is copied before the next step may overwrite it
    beside    (w - b) / (n s): how much slower a step is while files are written
    cost      w - n s: what a checkpoint takes from training, in seconds

All are medians over rounds with quartiles, both halves of a round side by side, so that a busy machine slows both.
`overhead` is cost / (250 s), of the default train.checkpoint_every.  The first round warms up.  On CPU the writing
threads take their cores from the step; beside an accelerator they have their own.
Writes experiments/results/checkpointing.{md,json}.
"""

import argparse
import contextlib
import pathlib
import shlex
import statistics
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

from experiments import bench_step
from qalora_jax import checkpoint
from qalora_jax import report
from qalora_jax import step as step_lib
from qalora_jax.models import decoder
from qalora_jax.models import linear

RESULTS = pathlib.Path(__file__).resolve().parent / 'results' / 'checkpointing'
ROWS, WINDOW, RANK, ALONE, EVERY = 2, 128, 64, 10, 250


class Position:
  """A data position, as far as a checkpoint asks for one."""

  def get_state(self) -> dict:
    return {'next': 0}


def trainer(scheme: linear.Scheme, config: decoder.Config):
  """(a function that runs a step, waits for it and returns the state, that state)."""
  model = decoder.Decoder(config, scheme)
  variables = jax.jit(lambda: {'frozen': {}, **bench_step.born(model)})()
  tokens = bench_step.batch(ROWS, WINDOW, config.vocab_size)
  state = jax.jit(lambda params: step_lib.init_state(bench_step.optimizer(), params))(variables['params'])
  compiled = jax.jit(bench_step.step(model), donate_argnums=0).lower(state, variables['frozen'], tokens).compile()

  def run():
    nonlocal state
    state, metrics = compiled(state, variables['frozen'], tokens)
    jax.block_until_ready((state, metrics))
    return state

  return run, state


def measure(run, state, place: pathlib.Path, rounds: int) -> dict:
  """The row of a method."""
  taken = []
  with checkpoint.open_manager(place, keep=1) as manager:
    for _ in range(rounds + 1):
      alone = []
      for _ in range(ALONE):
        begun = time.perf_counter()
        state = run()
        alone.append(time.perf_counter() - begun)
      step, begun, beside = statistics.median(alone), time.perf_counter(), 0
      checkpoint.save(manager, state, Position())
      held_up = time.perf_counter() - begun
      while manager.is_saving_in_progress():
        run()
        beside += 1
      whole = time.perf_counter() - begun
      checkpoint.check(manager)
      slower = (whole - held_up) / (beside * step) if beside else np.nan
      taken.append({
        'step': step, 'held_up': held_up, 'whole': whole, 'steps_beside': beside, 'beside': slower,
        'cost': whole - beside * step, 'overhead': (whole - beside * step) / (EVERY * step),
      })  # fmt: skip
  row = {'state_MiB': sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / 2**20}
  for name in taken[0]:
    low, middle, high = np.nanpercentile([found[name] for found in taken[1:]], [25, 50, 75])
    row |= {name: float(middle), f'{name} quartiles': f'{low:.4f} to {high:.4f}'}
  return row


def main(words: list[str] | None = None) -> None:
  """Measures, prints and stores."""
  parser = argparse.ArgumentParser(
    prog='python -m experiments.checkpointing', allow_abbrev=False, epilog=__doc__.partition('\n\n')[2],
    description=__doc__.partition('\n\n')[0], formatter_class=argparse.RawDescriptionHelpFormatter,
  )  # fmt: skip
  for name, value in (('width', 512), ('layers', 2), ('rounds', 12)):
    parser.add_argument(f'--{name}', type=int, default=value, metavar='N')
  parser.add_argument('--place', type=pathlib.Path, metavar='DIR', help='on the file system in question')
  parser.add_argument('--out', type=pathlib.Path, default=RESULTS, metavar='PATH', help='without a suffix')
  asked = parser.parse_args(words)
  size = bench_step.Size(asked.layers, asked.width, ROWS, WINDOW, asked.rounds)
  config = bench_step.config(size, jnp.float32, 'none')
  methods = {
    'QA-LoRA, 4 bits': bench_step.schemes(RANK, jnp.float32)[bench_step.QALORA[4]],
    'all weights': linear.Scheme(trains=True),
  }
  rows = []
  with contextlib.ExitStack() as stack:
    place = asked.place or pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
    for index, (name, scheme) in enumerate(methods.items()):
      rows.append({'method': name, **measure(*trainer(scheme, config), place / str(index), asked.rounds)})
  words = sys.argv[1:] if words is None else words
  settings = dict(
    width=asked.width, layers=asked.layers, rows_per_step=ROWS, window=WINDOW, rank=RANK, rounds=asked.rounds
  )
  command = shlex.join(['python', '-m', 'experiments.checkpointing', *words])
  report.publish(asked.out, 'a checkpoint beside steps (seconds)', command, rows, every=EVERY, **settings)


if __name__ == '__main__':
  main()

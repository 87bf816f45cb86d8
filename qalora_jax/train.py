"""`qalora train`: wires the rooms together, then the loop."""

import contextlib
import functools
import json
import pathlib
import sys
import time

import jax
import numpy as np

from qalora_jax import adapters
from qalora_jax import bases
from qalora_jax import build
from qalora_jax import checkpoint
from qalora_jax import cli
from qalora_jax import config as config_lib
from qalora_jax import events
from qalora_jax import hosts
from qalora_jax import lock
from qalora_jax import packed
from qalora_jax import preemption
from qalora_jax import program as program_lib
from qalora_jax import progress
from qalora_jax import quant
from qalora_jax import quantize
from qalora_jax import report
from qalora_jax import sharding
from qalora_jax import step as step_lib
from qalora_jax import stored
from qalora_jax.data import batches
from qalora_jax.evaluate import perplexity

SUMMARY = (
  'Trains what config.adapter names (qalora, lora, or full) on config.data.train and keeps it in the workdir.\n'
  'Run again with the same command, it goes on from the last checkpoint as if it had never stopped.'
)
_HOSTS = (
  config_lib.Flag('coordinator', 'string', '', 'HOST:PORT of process 0 of several.  Default: as the cluster says.'),
  config_lib.Flag('processes', 'integer', 0, 'How many processes this run has.'),
  config_lib.Flag('process', 'integer', None, 'Which of them this one is, from 0.'),
  config_lib.Flag('meeting', 'integer', hosts.MEETING, 'Seconds within which they must all have come.'),
  config_lib.Flag('heartbeat', 'integer', hosts.HEARTBEAT, 'Seconds without a sign of life that mean death.'),
)


# What of a line of metrics.jsonl depends on the machine.
SPEEDS = ('tokens_per_second', 'seconds_per_step')


class Diverged(ValueError):
  """A loss that is not a finite number; the last good checkpoint is kept."""


def main(argv=None) -> None:
  """Runs the command with `argv` (default: the process's)."""
  arguments = config_lib.parse('train', argv, summary=SUMMARY, extra_flags=(config_lib.REPLACE, *_HOSTS))
  values, checkpoints = arguments.values, arguments.workdir / build.CHECKPOINTS
  hosts.start(**{flag.name: values[flag.name] for flag in _HOSTS}, checkpoints=checkpoints)
  with hosts.ended(checkpoints):
    train(arguments.config, arguments.workdir, replace_config=values[config_lib.REPLACE.name])


def train(config, workdir, *, replace_config: bool = False) -> step_lib.State:
  """Trains as `config` says and returns the last state; everything else is left in `workdir`.

  Raises ValueError before any long work for what cannot be (another run in `workdir`, too), `Diverged` when the loss is
  not finite, OSError where the workdir cannot be written, and `preemption.Stopped` after SIGTERM or SIGINT, when the
  step is done and kept.
  """
  workdir = pathlib.Path(workdir)
  lock.refuse_held(workdir)
  with preemption.watched() as watch, contextlib.ExitStack() as held:
    return _train(config, workdir, replace_config, watch, lambda: held.enter_context(lock.alone(workdir)))


def _train(config, workdir: pathlib.Path, replace_config: bool, watch: preemption.Watch, hold) -> step_lib.State:
  """`train`; `hold()` takes the workdir, and is called when all is checked and nothing written yet."""
  if config.adapter.kind == 'none':
    raise ValueError('adapter.kind = "none" trains nothing; use "qalora", "lora", "head" or "full".')
  config = build.adopted(config, workdir)
  built = build.setup(config)
  mesh = build.make_mesh(config)
  program_lib.make(config, built, mesh)  # refuses what does not divide
  offloads = {'model.remat = "offload"': config.model.remat == 'offload', 'optim.offload = True': config.optim.offload}
  sharding.check_host_memory(mesh, [key for key, asked in offloads.items() if asked])
  tokenizer = build.tokenizer(config, built)
  encoded = build.encode(config, config.data.train, tokenizer, built.model)
  build.check_examples(config, 'data.train', encoded, built.model.config)
  train_data = batches.training(
    encoded,
    **build.widths(config, built.model),
    batch=config.train.batch,
    packing=config.data.packing,
    seed=config.seed,
  )
  held_out = config.data.validation
  validation = build.encode(config, held_out, tokenizer, built.model) if build.names_data(held_out) else []
  if validation:
    build.check_examples(config, 'data.validation', validation, built.model.config)
  begins = bases.beginning(config)
  if built.directory is not None and stored.is_quantized(built.directory) and config.adapter.kind in adapters.KINDS:
    stored.check_beginning(built.directory, begins)
  hosts.together(hold)
  if not replace_config:
    hosts.once(lambda: config_lib.save(config, workdir))
  built = _with_base(config, workdir, built)
  program = program_lib.make(config, built, mesh)
  # What a run that goes on began with is in its checkpoint.
  source = '' if build.is_run(workdir) else config.adapter.source
  drawn = build.variables(built, mesh, config.seed, config.sharding.fallback, workdir, begins, source)
  frozen = drawn['frozen']
  state = program.begin(drawn.pop('params'))
  _describe(state.params, frozen)
  score = functools.partial(
    perplexity.mean_loss,
    built.model,
    objective=program.objective,
    examples=validation,
    **build.widths(config, built.model),
    batch=config.train.batch,
    mesh=mesh,
  )
  with (
    contextlib.ExitStack() as patience,
    checkpoint.open_manager(workdir / build.CHECKPOINTS, config.train.keep) as manager,
  ):
    if manager.latest_step() is not None:
      del state  # the restored one takes its room
      state = checkpoint.restore(manager, program.state, train_data)
      progress.console.print(f'continuing from step {int(state.step)}')
    if replace_config:
      # Only now: a checkpoint that this config cannot restore leaves the config that wrote it.
      hosts.once(lambda: config_lib.save(config, workdir, replace=True))
    # Until the last checkpoint is written to its end.
    patience.enter_context(watch.steps())
    kept = Log(workdir, int(state.step), config.train.tensorboard) if hosts.first() else Silence()
    with kept as log:
      state = _loop(
        config,
        state,
        frozen,
        train_data,
        program=program,
        score=score if validation else None,
        manager=manager,
        log=log,
        watch=watch,
      )
  if (done := int(state.step)) < config.train.steps:
    watch.stop(f'after step {done} of {config.train.steps}, which is kept in {workdir}')
  return state


def _with_base(config, workdir: pathlib.Path, built: build.Setup) -> build.Setup:
  """`built`, or, where the base has to be calibrated, what is built on the one in the workdir, which is made once."""
  if built.directory is None or stored.is_quantized(built.directory) or not bases.needs_quantize(config):
    return built
  if not packed.holds(workdir / build.BASE):
    if jax.process_count() > 1:
      raise ValueError(
        'this base takes more than rounding, which is the work of one process: run `qalora quantize` with this config, '
        'and name its directory as model.source.'
      )
    quantize.quantize(config, workdir / build.BASE)
  return build.setup(build.prepared(config, workdir))


def _loop(config, state, frozen, data, *, program, score, manager, log, watch) -> step_lib.State:
  """The state after the last step, or after the one at which `watch` says to stop; it is being kept."""
  settings = config.train
  done = int(state.step)
  losses, tokens, since = [], 0, time.monotonic()
  with progress.bar('training', settings.steps, start=done) as bar:
    while done < settings.steps:
      batch = next(data)
      state, metrics = program.step(state, frozen, hosts.spread(batch, program.batch['tokens'].sharding))
      done += 1
      losses.append((metrics['loss'], metrics['grad_norm']))
      tokens += sum(np.count_nonzero(batch[name]) for name in batch if name.endswith('segments'))
      last = done == settings.steps
      stops = watch.reached(done) and not last
      keeps = last or stops or done % settings.checkpoint_every == 0
      validates = score and (last or (settings.validate_every and done % settings.validate_every == 0))
      logs = last or done % settings.log_every == 0
      if not (keeps or validates or logs):
        bar.advance()
        continue
      # Here alone the host waits for the device: a checkpoint is only ever written of losses seen to be finite.
      _check_finite(done, jax.device_get(losses), manager.directory)
      checkpoint.check(manager)
      seconds, since = time.monotonic() - since, time.monotonic()
      speed, each = tokens / seconds, seconds / len(losses)
      losses, tokens = [], 0
      if logs:
        log.write(
          done,
          loss=metrics['loss'],
          grad_norm=metrics['grad_norm'],
          learning_rate=program.rate(done - 1),
          **{program.objective.unit: metrics[program.objective.unit]},
          **dict(zip(SPEEDS, (speed, each), strict=True)),
        )
      bar.advance(text=f'loss {float(metrics["loss"]):.4f}  {speed:,.0f} tokens/s')
      if validates:
        log.write(done, validation_loss=score({'params': state.params, 'frozen': frozen}))
        since = time.monotonic()
      if keeps:
        checkpoint.save(manager, state, data)
      if stops:
        break
  return state


def _check_finite(done: int, losses: list[tuple], place) -> None:
  """Raises Diverged if a loss, or the norm of a gradient that the weights have since been moved by, is not finite."""
  bad = np.flatnonzero(~np.isfinite(losses).all(-1))
  if bad.size:
    first = done - len(losses) + 1 + int(bad[0])
    loss, norm = losses[bad[0]]
    raise Diverged(
      f'the loss of step {first} is {loss}, its gradient norm {norm}. The last good checkpoint is kept in {place}. '
      'Try a lower optim.learning_rate, optim.warmup_steps, a smaller optim.clip, or model.dtype = "float32".'
    )


def _describe(params: dict, frozen: dict) -> None:
  trained = f'{adapters.count(params):,} trained parameters'
  size = quant.summary(frozen) if frozen else 'no frozen weights'
  progress.console.print(f'{trained}; {size}; {jax.device_count()} {jax.default_backend()} device(s)')


class Log(contextlib.AbstractContextManager):
  """metrics.jsonl, one object a line, and TensorBoard; lines after `step` (of a run that was cut off) are dropped.

  TensorBoard hides what a run that was cut off wrote after `step`.  Raises OSError, naming the file, where it cannot be
  written.
  """

  def __init__(self, workdir: pathlib.Path, step: int, tensorboard: bool):
    path = workdir / 'metrics.jsonl'
    kept = []
    if path.exists():
      # A kill can leave half a line, which has no newline yet.
      whole = path.read_text().split('\n')[:-1]
      try:
        kept = [line for line in whole if json.loads(line)['step'] <= step]
      except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{path}: a line is no line of metrics ({error}); remove it, or the file.') from None
    # Whole: a kill in between would take the lines before `step` too.
    report.whole(path, lambda partial: partial.write_text(''.join(line + '\n' for line in kept)))
    # Unbuffered: nothing is lost to a kill, and what a full disk did not take is not tried again at the end.
    self._file, self._board = path.open('ab', buffering=0), None
    if tensorboard:
      place = workdir / 'tensorboard'
      place.mkdir(exist_ok=True)
      self._board = (place / events.name()).open('ab', buffering=0)
      report.append(self._board, events.begin(step + 1))

  def write(self, step: int, **values) -> None:
    """The values of one step."""
    values = {name: float(value) for name, value in values.items()}
    report.append(self._file, (json.dumps({'step': step, **values}) + '\n').encode())
    if self._board:
      report.append(self._board, events.scalars(step, values))

  def __exit__(self, *_):
    self._file.close()
    if self._board:
      self._board.close()


class Silence(contextlib.AbstractContextManager):
  """The Log of every process but the first: nothing is written twice."""

  def write(self, step: int, **values) -> None:
    """Writes nothing."""

  def __exit__(self, *_):
    pass


if __name__ == '__main__':
  cli.run(main, 'qalora train', sys.argv[1:])

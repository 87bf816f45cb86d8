"""Checkpoints of what training changes: weights, optimizer, data position.  The base is named, never copied."""

import contextlib
import pathlib

import grain
import orbax.checkpoint as ocp

from qalora_jax import step as step_lib

_ITEMS = ('params', 'optimizer', 'data')


def open_manager(directory, keep: int) -> ocp.CheckpointManager:
  """A manager of `directory` that writes asynchronously and keeps the last `keep` checkpoints."""
  options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=True)
  return ocp.CheckpointManager(pathlib.Path(directory).absolute(), item_names=_ITEMS, options=options)


def exists(directory) -> bool:
  """Whether `directory` holds at least one finished checkpoint."""
  path = pathlib.Path(directory)
  return path.is_dir() and any(p.name.isdigit() for p in path.iterdir())


def save(manager: ocp.CheckpointManager, state: step_lib.State, data: grain.DatasetIterator) -> None:
  """Writes the state and the data's position under the state's step, unless that step is there already."""
  count = int(state.step)
  if count == manager.latest_step():
    return
  optimizer = {'step': state.step, 'opt_state': state.opt_state}
  manager.save(
    count,
    args=ocp.args.Composite(
      params=ocp.args.StandardSave(state.params),
      optimizer=ocp.args.StandardSave(optimizer),
      data=grain.checkpoint.CheckpointSave(data),
    ),
  )


def restore(manager: ocp.CheckpointManager, abstract: step_lib.State, data: grain.DatasetIterator) -> step_lib.State:
  """The latest state, on the shardings of `abstract`; `data` is moved to its position.

  Raises ValueError where the checkpoint's weights have other names or shapes than `abstract`.
  """
  optimizer = {'step': abstract.step, 'opt_state': abstract.opt_state}
  with _explained(manager):
    restored = manager.restore(
      manager.latest_step(),
      args=ocp.args.Composite(
        params=ocp.args.StandardRestore(abstract.params),
        optimizer=ocp.args.StandardRestore(optimizer),
        data=grain.checkpoint.CheckpointRestore(data),
      ),
    )
  return step_lib.State(restored['optimizer']['step'], restored['params'], restored['optimizer']['opt_state'])


def restore_params(directory, abstract: dict) -> tuple[int, dict]:
  """The latest step and its trained weights, without optimizer and data."""
  with open_manager(directory, keep=None) as manager:
    latest = manager.latest_step()
    if latest is None:
      raise FileNotFoundError(f'{directory} holds no checkpoint; run `qalora train` into that workdir first.')
    args = ocp.args.Composite(params=ocp.args.StandardRestore(abstract))
    with _explained(manager):
      return latest, manager.restore(latest, args=args)['params']


@contextlib.contextmanager
def _explained(manager: ocp.CheckpointManager):
  """Turns what orbax says of a bad checkpoint into one ValueError that names the place and the way out."""
  try:
    yield
  except (ValueError, KeyError, TypeError, OSError) as error:
    raise ValueError(
      f'{manager.directory}: the latest checkpoint cannot be restored ({error}). It is corrupt, or was written by '
      'another model or adapter; remove its folder to go back to the step before, or use another workdir.'
    ) from error

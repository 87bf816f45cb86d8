"""Checkpoints of what training changes: weights, optimizer, data position.  The base is named, never copied.

    STEP/params, optimizer, data   orbax's arrays; the data's position as JSON, whatever the number of processes
    STEP/digests.json              bytes and CRC-32 of every file
    damaged/STEP                   what a run could not go on from, set aside

A checkpoint is written under another name, digests last, and gets its own when it is whole: a process that is killed
leaves the one before it.  What happens to its files later (a disk that fails, a copy cut short, power that goes before
the system has written) shows in the digests when they are read.
"""

from collections.abc import Callable
from collections.abc import Iterator
import concurrent.futures
import contextlib
import json
import logging
import os
import pathlib
import re
import sys
import zlib

import grain
import jax
from jax.experimental import multihost_utils
import numpy as np
import orbax.checkpoint as ocp

from qalora_jax import progress
from qalora_jax import step as step_lib

DIGESTS, DAMAGED = 'digests.json', 'damaged'
_ITEMS = ('params', 'optimizer', 'data')
_UNFINISHED = '.orbax-checkpoint-tmp'
# orbax writes into these when it gives the checkpoint its name, after the digests; nothing that is restored is in them.
_LATER = ('_CHECKPOINT_METADATA', 'commit_success.txt')
_PIECE = 1 << 24


@contextlib.contextmanager
def open_manager(directory, keep: int) -> Iterator[ocp.CheckpointManager]:
  """A manager of `directory` that writes asynchronously and keeps the last `keep` checkpoints.

  It removes what a killed process left unfinished.  Raises OSError, also at its end, as `check` does.
  """
  directory = pathlib.Path(directory).absolute()
  options = ocp.CheckpointManagerOptions(
    max_to_keep=keep,
    create=True,
    cleanup_tmp_directories=True,
    enable_async_checkpointing=True,
    # Called by the first process when all files are there and the name is not yet given.
    async_options=ocp.options.AsyncOptions(post_finalization_callback=lambda: _write_digests(directory)),
  )
  _quiet()
  with _writing(directory):
    manager = ocp.CheckpointManager(directory, item_names=_ITEMS, options=options)
  try:
    yield manager
  except BaseException:
    # What went wrong first is what is said.
    with contextlib.suppress(Exception):
      manager.close()
    raise
  with _writing(directory):
    manager.close()


def steps(directory) -> list[int]:
  """The steps of the checkpoints in `directory` that were finished, the last one first."""
  path = pathlib.Path(directory)
  return sorted((int(p.name) for p in path.iterdir() if p.name.isdigit()), reverse=True) if path.is_dir() else []


def exists(directory) -> bool:
  """Whether `directory` holds at least one finished checkpoint."""
  return bool(steps(directory))


def save(manager: ocp.CheckpointManager, state: step_lib.State, data: grain.DatasetIterator) -> None:
  """Writes the state and the data's position under the state's step, unless that step is there already.

  Returns while files are still being written; raises OSError as `check` does.
  """
  count = int(state.step)
  if count == manager.latest_step():
    return
  optimizer = {'step': state.step, 'opt_state': state.opt_state}
  with _writing(manager.directory):
    manager.save(
      count,
      args=ocp.args.Composite(
        params=ocp.args.StandardSave(state.params),
        optimizer=ocp.args.StandardSave(optimizer),
        data=ocp.args.JsonSave(data.get_state()),
      ),
    )


def check(manager: ocp.CheckpointManager) -> None:
  """Raises OSError, naming the last whole checkpoint, if one could not be written; never waits."""
  if not manager.is_saving_in_progress():
    with _writing(manager.directory):
      manager.wait_until_finished()


def restore(manager: ocp.CheckpointManager, abstract: step_lib.State, data: grain.DatasetIterator) -> step_lib.State:
  """The latest undamaged state, on the shardings of `abstract`, any mesh's; `data` is moved to its position.

  Damaged checkpoints after it are set aside, with a warning.  Raises ValueError where none is left, and where the
  weights of one that is whole have other names or shapes than `abstract`.
  """
  directory = pathlib.Path(manager.directory)
  target = {'params': abstract.params, 'optimizer': {'step': abstract.step, 'opt_state': abstract.opt_state}}

  def read(step):
    args = ocp.args.Composite(**{name: ocp.args.StandardRestore(tree) for name, tree in target.items()})
    return manager.restore(step, args=args), _position(directory / str(step) / 'data')

  step, (restored, position), damaged = _latest(manager, _ITEMS, abstract.params, read)
  if damaged:
    if not jax.process_index():
      for wrong in damaged:
        _set_aside(directory / str(wrong))
    _barrier('damaged checkpoints are set aside')
    manager.reload()
    _warn(f'{_listed(directory, damaged)}. Set aside in {directory / DAMAGED}; going on from step {step}')
  data.set_state(position)
  return step_lib.State(restored['optimizer']['step'], restored['params'], restored['optimizer']['opt_state'])


def restore_params(directory, abstract: dict) -> tuple[int, dict]:
  """The latest step whose trained weights are undamaged and these weights, without optimizer and data.

  Changes nothing.  Raises ValueError as `restore` does, and FileNotFoundError where there is no checkpoint.
  """
  directory = pathlib.Path(directory).absolute()
  if not exists(directory):
    raise FileNotFoundError(f'{directory} holds no checkpoint; run `qalora train` into that workdir first.')
  options = ocp.CheckpointManagerOptions(read_only=True, create=False)
  with ocp.CheckpointManager(directory, item_names=_ITEMS, options=options) as manager:
    args = ocp.args.Composite(params=ocp.args.StandardRestore(abstract))
    step, restored, damaged = _latest(manager, ('params',), abstract, lambda step: manager.restore(step, args=args))
  if damaged:
    _warn(f'{_listed(directory, damaged)}; the weights of step {step} are used')
  return step, restored['params']


def _latest(manager, items: tuple[str, ...], params: dict, read: Callable) -> tuple[int, object, dict[int, str]]:
  """(step, read(step), {step: what is wrong with it} of the damaged ones after it) of the latest undamaged step.

  Damage to others than the `items` that are read is none.  `params` are the abstract weights.
  """
  directory, damaged = pathlib.Path(manager.directory), {}
  found = steps(directory)
  _check_same(directory, found)
  for step in found:
    path = directory / str(step)
    wrong = _agreed(lambda path=path: _damage(path, items))
    if not wrong:
      _check_fits(manager, step, params)
      try:
        return step, read(step), damaged
      except (ValueError, KeyError, TypeError, OSError) as error:
        wrong = f'orbax cannot read it: {_short(error)}'
        if (path / DIGESTS).exists():
          raise ValueError(
            f'{path} cannot be restored, though its files are as they were written ({wrong}). Was it written with '
            'other settings of optim? Take these, or use another workdir.'
          ) from error
        if jax.process_count() > 1:
          # The others may have read it, and would go on.
          raise ValueError(
            f'{path} cannot be restored ({wrong}); go on once in one process, which sets it aside.'
          ) from error
    damaged[step] = wrong
  raise ValueError(
    f'{_listed(directory, damaged)}. No whole checkpoint is left, and nothing was changed. Bring its files back from a '
    f'copy; or remove {directory} to begin anew.'
  )


def _damage(path: pathlib.Path, items: tuple[str, ...]) -> str:
  """What of a checkpoint's `items` differs from its digests, in words, or nothing; without digests nothing is known."""
  if not (path / DIGESTS).exists():
    return ''
  try:
    stated = json.loads((path / DIGESTS).read_text())
    stated = {name: tuple(digest) for name, digest in stated['files'].items()}
  except (ValueError, KeyError, TypeError, AttributeError):
    return f'{DIGESTS} is cut short'
  stated = {name: digest for name, digest in stated.items() if name.partition('/')[0] in items}
  found = _digests(path, stated)
  wrong = [f'{name} {_difference(digest, found[name])}' for name, digest in stated.items() if digest != found[name]]
  return wrong[0] + (f' and {len(wrong) - 1} more' if len(wrong) > 1 else '') if wrong else ''


def _difference(stated: tuple, found: tuple | None) -> str:
  if found is None:
    return 'is missing'
  return f'has {found[0]} bytes of {stated[0]}' if found[0] != stated[0] else 'has other contents'


def _digests(path: pathlib.Path, names) -> dict[str, tuple[int, int] | None]:
  """{name: (bytes, CRC-32)} of the files below `path`, None for one that cannot be read."""

  def one(name):
    size = crc = 0
    try:
      with (path / name).open('rb') as file:
        while piece := file.read(_PIECE):
          size, crc = size + len(piece), zlib.crc32(piece, crc)
    except OSError:
      return None
    return size, crc

  # zlib lets other threads run.
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    return dict(zip(names, pool.map(one, names), strict=True))


def _write_digests(directory: pathlib.Path) -> None:
  """Digests of all files of the checkpoint that is being written, into it."""
  for path in directory.glob(f'*{_UNFINISHED}*'):
    files = sorted(str(file.relative_to(path)) for file in path.rglob('*') if file.is_file())
    found = _digests(path, [name for name in files if name not in _LATER])
    (path / DIGESTS).write_text(json.dumps({'digest': 'bytes, crc32', 'files': found}))


def _position(path: pathlib.Path) -> dict:
  """The data's position; before there were several processes grain wrote it."""
  written, grains = path / 'metadata', path / 'process_0-of-1.json'
  return json.loads((grains if grains.exists() else written).read_text())


def _check_fits(manager, step: int, params: dict) -> None:
  """Raises ValueError where a checkpoint says that its weights have other names or shapes than `params`."""
  try:
    found = _shapes(ocp.StandardCheckpointHandler().metadata(manager.directory / str(step) / 'params').tree)
  except Exception:  # whatever orbax makes of metadata that cannot be read; restoring says more
    return
  wanted = _shapes(params)
  if wrong := [name for name in sorted(found.keys() | wanted.keys()) if found.get(name) != wanted.get(name)]:
    name = wrong[0]
    raise ValueError(
      f'{manager.directory}: the checkpoint of step {step} is of another model or adapter: {name} has the shape '
      f'{found.get(name, "of nothing")} there and {wanted.get(name, "of nothing")} in this config. Take the config '
      'that it was written with, or use another workdir.'
    )


def _shapes(tree) -> dict[str, tuple]:
  leaves = jax.tree.leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator='/'): tuple(leaf.shape) for path, leaf in leaves}


def _set_aside(path: pathlib.Path) -> None:
  """Moves a checkpoint to a place where nothing looks for one."""
  place = path.parent / DAMAGED
  place.mkdir(exist_ok=True)
  taken = [int(found.name.partition('-')[2] or 1) for found in place.glob(f'{path.name}*')]
  path.rename(place / (f'{path.name}-{max(taken) + 1}' if taken else path.name))


def _listed(directory: pathlib.Path, damaged: dict[int, str]) -> str:
  said = '; '.join(f'of step {step} ({wrong})' for step, wrong in damaged.items())
  return f'{directory}: damaged checkpoint{"s" * (len(damaged) > 1)} {said}'


def _warn(message: str) -> None:
  progress.console.print(f'warning: {message}', markup=False)


@contextlib.contextmanager
def _writing(directory) -> Iterator[None]:
  """Turns whatever stops orbax from writing into one OSError that names the place and the way out."""
  try:
    yield
  except Exception as error:  # tensorstore's, asyncio's and the system's
    # The one that failed is not among them: its name comes last.
    whole = next((f'that of step {step} is intact' for step in steps(directory)), 'there is none before it')
    code = re.search(r"os_error_code='(\d+)'", str(error))  # so tensorstore
    why = os.strerror(int(code[1])) if code else getattr(error, 'strerror', None) or _short(error)
    raise OSError(
      f'{directory}: a checkpoint could not be written ({why}); {whole}. Make room, or make the place writable; then '
      'the same command goes on from the last one.'
    ) from error


def _quiet() -> None:
  """Keeps orbax's threads from saying, traceback and all, what is raised as well; for good, as they say it late."""
  logging.getLogger('absl').addFilter(_not_orbax)
  logging.getLogger('asyncio').addFilter(_not_a_write)
  if not _HOOKS:
    _HOOKS.append(sys.unraisablehook)
    sys.unraisablehook = _unraisable


_HOOKS = []


def _not_orbax(record: logging.LogRecord) -> bool:
  return 'orbax' not in pathlib.Path(record.pathname).parts


def _not_a_write(record: logging.LogRecord) -> bool:
  # Many arrays are written at once; when a second fails after the first, nobody asks its task any more.
  said = record.getMessage()
  return not (said.startswith('Task exception was never retrieved') and f'{os.sep}orbax{os.sep}' in said)


def _unraisable(late) -> None:
  # Of a write that failed after another: tensorstore tells it to a loop that has ended.
  if not (late.exc_type is RuntimeError and str(late.exc_value) == 'Event loop is closed'):
    _HOOKS[-1](late)


def _short(error: Exception) -> str:
  """The first line of what an error says, and of which kind it is."""
  said = str(error).strip().partition('\n')[0]
  return f'{type(error).__name__}: {said[:300]}'


def _agreed(find: Callable[[], str]) -> str:
  """What `find` finds in the first process; the others learn whether it is something."""
  if jax.process_count() == 1:
    return find()
  found = '' if jax.process_index() else find()
  some = bool(multihost_utils.broadcast_one_to_all(np.array(bool(found))))
  return found or 'as the first process found' if some else ''


def _check_same(directory: pathlib.Path, found: list[int]) -> None:
  """Raises ValueError, in every process, where one of them sees other checkpoints in `directory` than the first."""
  if jax.process_count() == 1:
    return
  mine = zlib.crc32(json.dumps(found).encode()) & 0x7FFFFFFF
  if len(set(np.ravel(multihost_utils.process_allgather(np.array(mine, np.int32))).tolist())) > 1:
    raise ValueError(
      f'{directory}: the processes of this run see different checkpoints, this one {found}. The workdir has to be one '
      'directory for all hosts; just after a restart, wait until the file system shows all of them the same.'
    )


def _barrier(name: str) -> None:
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)

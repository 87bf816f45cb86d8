"""Several processes that are one run: how they meet, what only the first of them does, and what they tell each other.

JAX's multi-controller runtime: every process runs the same program on its own devices, and `jax.devices()` are those of
all.  Whatever changes arrays must be called by all processes alike; files are written by the first.
"""

import atexit
from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import os
import re
import sys
import warnings

import jax
from jax.experimental import multihost_utils
import numpy as np

from qalora_jax import aborts
from qalora_jax import progress

# Seconds without a sign of life after which a process counts as dead.  They come from a thread of the runtime, which
# compilations and checkpoints do not hold up; JAX's own 100 s are paid by every other device of the run.
HEARTBEAT = 30
# Seconds in which all processes must have come: JAX's own, since hosts of a cluster start minutes apart.
MEETING = 300
# Seconds that a process which is done waits for the others; they end at the same step.
_LEAVING = 60
# Errors of the runtime that say that a peer is gone, rather than that a program is wrong.
_LOST = re.compile(r'gloo|nccl|coordination service|heartbeat|barrier|connection (reset|closed)|socket closed', re.I)
# Where Slurm (in a step of srun) and Open MPI say how many processes they have started as one.
_TASKS = ('SLURM_STEP_NUM_TASKS', 'OMPI_COMM_WORLD_SIZE')
# Bytes that a gather holds on a device for each process.
_PIECE = 2**26


def start(
  coordinator: str = '',
  processes: int = 0,
  process: int | None = None,
  *,
  heartbeat: int = HEARTBEAT,
  meeting: int = MEETING,
  checkpoints='',
) -> None:
  """Joins this process to its run; before anything touches a device.

  `coordinator` is HOST:PORT, where process 0 listens; `processes` is their number, `process` this one's, from 0.
  Without them, what JAX detects (Slurm, TPU pods, Open MPI, Kubernetes); processes = 1 alone asks for no detection.
  Where there is nothing to join, as for the only task of a job, this does nothing: the process has all its devices.
  `checkpoints` is the directory of the run's.

  Raises ValueError for flags that do not go together and for a port that is taken.  Processes that do not meet within
  `meeting` seconds end, as does, after `heartbeat` seconds, every process of a run that has lost one: by SIGABRT and
  with one message.
  """
  _check(coordinator, processes, process)
  for name, seconds in (('heartbeat', heartbeat), ('meeting', meeting)):
    if seconds < 1:
      raise ValueError(f'--{name}={seconds}: seconds, at least 1.')
  if processes == 1 or jax.distributed.is_initialized():
    return
  known = processes or tasks()
  if known == 1:
    return
  where = coordinator or 'the address that the cluster gave'
  if coordinator:
    # Undetected: Slurm's number of a task on its host would choose the devices.
    how = dict(coordinator_address=coordinator, num_processes=processes, process_id=process)
    how['cluster_detection_method'] = 'deactivate'
  else:
    how = {'local_device_ids': []} if _sees_its_own() else {}
  unmet = (
    f'the processes of this run have not met at {where} within {meeting} s. Start the same command for every process, '
    'process 0 on that host, and see that its port can be reached.'
  )
  if known:
    aborts.watch(unmet, checkpoints)
  seconds = dict(initialization_timeout=meeting, heartbeat_timeout_seconds=heartbeat, shutdown_timeout_seconds=_LEAVING)
  try:
    with warnings.catch_warnings():
      # Kubernetes' package is missing in every pod that is no cluster, too.
      warnings.simplefilter('ignore')
      jax.distributed.initialize(**how, **seconds)
  except ValueError as error:
    if not known and 'coordinator_address' in str(error):
      return  # no cluster
    raise ValueError(_unjoined(coordinator, error)) from None
  except RuntimeError as error:
    if not known and 'must be called before' in str(error):
      return  # a program of the user's own, which has begun with JAX already
    raise ValueError(_unjoined(coordinator, error)) from None
  if not known and jax.process_count() > 1:
    aborts.watch(unmet, checkpoints)
  if not first():
    progress.silence()


def tasks() -> int:
  """The number of processes that Slurm or Open MPI says it has started as one; 0 where neither says anything."""
  return next((int(os.environ[name]) for name in _TASKS if os.environ.get(name, '').isdigit()), 0)


def alone(verb: str) -> None:
  """ValueError where `qalora VERB`, the work of one process, has been started as several."""
  # Without a cluster's word the runtime's: the hosts of a TPU pod are one by themselves.
  count = tasks() or jax.process_count()
  if count > 1:
    raise ValueError(f'`qalora {verb}` is the work of one process, and {count} were started; start it on one host.')


def first() -> bool:
  """Whether this process is the one that writes and prints."""
  return jax.process_index() == 0


@contextlib.contextmanager
def ended(checkpoints) -> Iterator[None]:
  """Where the work inside fails, this process leaves at once, not waiting for the others as JAX's own exit does.

  Raises ConnectionError in place of an error of the runtime that says that another process is gone; `checkpoints` is
  the directory of the run's.
  """
  try:
    yield
  except Exception as error:
    if jax.process_count() == 1:
      raise
    lost = isinstance(error, jax.errors.JaxRuntimeError) and _LOST.search(str(error))
    # After what Python still has to print, before JAX's own, which was registered earlier.
    atexit.register(_leave, 2 if lost or isinstance(error, ValueError | OSError) else 1)
    if lost:
      raise ConnectionError(aborts.gone(checkpoints)) from None
    raise


def together(work: Callable):
  """work() in every process; where one fails, it raises its own error and the others a ValueError that says it."""
  if jax.process_count() == 1:
    return work()
  result, failure = None, None
  try:
    result = work()
  except Exception as error:
    failure = error
  said = [text.decode() for text in gather(b'' if failure is None else (str(failure) or repr(failure)).encode())]
  if failure is not None:
    raise failure
  for process, text in enumerate(said):
    if text:
      raise ValueError(f'process {process}: {text}')
  return result


def once(work: Callable) -> None:
  """work() in the first process alone; where it fails there, all raise what it says, as `together`."""
  together(lambda: work() if first() else None)


def gather(mine: bytes) -> list[bytes]:
  """What every process has, in their order; each gives a string of bytes of any length."""
  if jax.process_count() == 1:
    return [mine]
  # Two numbers: JAX's integers have 32 bits.
  sizes = multihost_utils.process_allgather(np.array(divmod(len(mine), _PIECE), np.int32))
  lengths = [int(pieces) * _PIECE + int(rest) for pieces, rest in sizes]
  longest, parts = max(lengths), []
  for start_ in range(0, longest, _PIECE):
    piece = np.zeros(min(_PIECE, longest - start_), np.uint8)
    own = np.frombuffer(mine[start_ : start_ + _PIECE], np.uint8)
    piece[: len(own)] = own
    parts.append(multihost_utils.process_allgather(piece))
  whole = np.concatenate([np.zeros((len(lengths), 0), np.uint8), *parts], axis=1)
  return [row[:length].tobytes() for row, length in zip(whole, lengths, strict=True)]


def spread(batch: dict, sharding: jax.sharding.Sharding) -> dict:
  """A batch, the same in every process, as arrays over all devices; each process sends its own devices their rows."""
  return {
    name: jax.make_array_from_callback(rows.shape, sharding, lambda index, rows=rows: rows[index])
    for name, rows in batch.items()
  }


def _check(coordinator: str, processes: int, process: int | None) -> None:
  given = (coordinator != '', processes != 0, process is not None)
  shown = f'--coordinator={coordinator} --processes={processes} --process={"" if process is None else process}'
  if given != (False, processes == 1, False) and not all(given):
    raise ValueError(
      f'{shown}: give all three, --coordinator=HOST:PORT --processes=N --process=I with I from 0 to N - 1, or none '
      '(--processes=1 alone: only this process, whatever the cluster says).'
    )
  if all(given) and not re.fullmatch(r'(\[[^]]+\]|[^:]+):\d+', coordinator):
    raise ValueError(f'{shown}: the coordinator is HOST:PORT, such as node1:8476.')
  if all(given) and not 0 <= process < processes:
    raise ValueError(f'{shown}: {processes} processes are numbered from 0 to {processes - 1}.')


def _unjoined(coordinator: str, error: Exception) -> str:
  if coordinator:
    return f'this process cannot begin at --coordinator={coordinator}: {error}; is the port taken?'
  return f'JAX cannot join the processes of this run: {error}; with --processes=1 this one trains alone.'


def _sees_its_own() -> bool:
  """Whether a task of Slurm may use all devices that it sees: it is alone on its host, or has been given one.

  Otherwise JAX gives each the device of its number on the host.
  """
  count, hosts = (os.environ.get(name, '') for name in ('SLURM_STEP_NUM_TASKS', 'SLURM_STEP_NUM_NODES'))
  given = [device for device in os.environ.get('CUDA_VISIBLE_DEVICES', '').split(',') if device]
  return bool(count) and count == hosts or len(given) == 1


def _leave(status: int) -> None:
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(status)

"""One process at a time in a directory: a lock of the kernel on a file in it, which a process that dies lets go.

The file stays, empty; only the lock on it counts.  On a cluster the file system must have flock.
"""

from collections.abc import Iterator
import contextlib
import errno
import fcntl
import pathlib
import time

import jax

FILE = 'lock'
# What flock answers where another holds the lock, and where a file system has none.
_HELD = (errno.EWOULDBLOCK, errno.EACCES)
_NONE = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextlib.contextmanager
def taken(path: pathlib.Path, shared: bool = False) -> Iterator[bool]:
  """Whether the lock on the file `path`, made where it is missing, could be had; it is given back at the end.

  A `shared` lock is for who only looks whether somebody holds it.
  """
  with path.open('r' if shared and path.exists() else 'a') as file:
    yield _lock(file, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)


@contextlib.contextmanager
def alone(directory: pathlib.Path) -> Iterator[None]:
  """Makes `directory` where it is missing and holds it against other runs; of several processes the first does.

  Raises ValueError where another run is at work in it, and OSError where it cannot be written.
  """
  if jax.process_index():
    yield
    return
  directory.mkdir(parents=True, exist_ok=True)
  with taken(directory / FILE) as free:
    if not free:
      raise ValueError(_refusal(directory))
    yield


def refuse_held(directory: pathlib.Path) -> None:
  """Raises ValueError, in the first process, where another run is at work in `directory`; nothing is written."""
  # The other processes may come when the first one of their own run has the lock.
  if not jax.process_index() and (directory / FILE).is_file():
    with taken(directory / FILE, shared=True) as free:
      if not free:
        raise ValueError(_refusal(directory))


def _refusal(directory: pathlib.Path) -> str:
  return (
    f'{directory} is in use by another run (`fuser {directory / FILE}` names its process on this machine). '
    'Wait for it, stop it, or use another --workdir.'
  )


def _lock(file, how: int) -> bool:
  # Who only looks holds it for an instant.
  for pause in (0.05, 0.05, None):
    try:
      fcntl.flock(file, how | fcntl.LOCK_NB)
    except OSError as error:
      if error.errno in _NONE:
        raise OSError(f'{file.name} cannot be locked ({error.strerror}): mount the file system with flock.') from None
      if error.errno not in _HELD:
        raise
    else:
      return True
    if pause:
      time.sleep(pause)
  return False

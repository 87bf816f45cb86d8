"""A run that is told to stop: it goes on to the end of a step, keeps everything, and says so.

SIGTERM is how a cluster takes a machine back; SIGINT is Ctrl-C, of which the second one does not wait.  With several
processes JAX's preemption service, which listens for SIGTERM itself, lets all of them stop after the same step.
"""

from collections.abc import Iterator
import contextlib
import signal
import threading

# What a process that was stopped exits with: an interrupt ends the shell's script too, preemption is as it should be.
_STATUS = {signal.SIGTERM: 0, signal.SIGINT: 128 + signal.SIGINT}


class Stopped(KeyboardInterrupt):
  """A run that was told to stop, after everything is kept; `status` is for its process to exit with."""

  def __init__(self, message: str, received: int):
    # Both: an exception is unpickled from its arguments, and a worker of a pool sends it to its caller.
    super().__init__(message, received)
    self.status = _STATUS[received]

  def __str__(self):
    return self.args[0]


class Watch:
  """What `watched` yields."""

  def __init__(self):
    self._received = None
    self._patient = False

  @contextlib.contextmanager
  def steps(self) -> Iterator[None]:
    """Inside, a signal waits for `reached`; outside, where there is nothing to keep, it raises Stopped at once."""
    self._patient = True
    try:
      yield
    finally:
      self._patient = False

  def reached(self, step: int) -> bool:
    """Whether to stop now, `step` steps being done; every process asks after every step and gets the same answer."""
    # Here, so that a command's help does not wait for JAX.
    import jax
    from jax.experimental import multihost_utils

    if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
      self._received = signal.SIGTERM
    return self._received is not None

  def stop(self, said: str) -> None:
    """Raises Stopped with what is `said` of where the run is."""
    name = signal.Signals(self._received).name
    raise Stopped(f'stopped by {name} {said}; the same command goes on from there.', self._received)

  def _receive(self, number, frame) -> None:
    again = self._received == number == signal.SIGINT
    self._received = number
    if again:
      raise KeyboardInterrupt
    if not self._patient:
      self.stop('before a step, with nothing new to keep')


@contextlib.contextmanager
def watched() -> Iterator[Watch]:
  """Listens for SIGTERM and SIGINT; in a thread that gets no signals, only to the preemption service."""
  import jax

  watch = Watch()
  # With several processes the service has SIGTERM, and one process alone must not stop at a step of its own.
  listens = threading.current_thread() is threading.main_thread() and jax.process_count() == 1
  before = {number: signal.signal(number, watch._receive) for number in _STATUS} if listens else {}
  try:
    yield watch
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)

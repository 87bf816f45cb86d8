"""One clear message in place of what JAX's runtime prints as it ends a process whose run has fallen apart.

Where the processes of a run do not meet, or one of them is gone, the runtime writes a trace of some thirty lines and
calls abort() from a thread of its own: no Python runs any more that could say it better.  So stderr of such a process
goes through this file, run as a program that outlives it.  All other lines pass as they come.
"""

from collections.abc import Iterable
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
from typing import TextIO

OWN = 'qalora train: error: '
GONE = 'another process of this run is gone'
# absl's log: severity, date, time, thread, file.
_LOG = re.compile(r'(?P<severity>[IWEF])\d{4} [\d:.]+ +\d+ (?P<file>[\w.]+):\d+\] ')
# Where the runtime speaks of its peers; the last calls abort().
_PEERS = ('coordination_service.cc', 'coordination_service_agent.cc', 'preemption_sync_manager.cc', 'client.h')
_END = '*** Check failure stack trace: ***'
_MEETING = '/RegisterTask'


def watch(unmet: str, checkpoints) -> None:
  """Sends this process's stderr through `relay`, which keeps what it leaves out beside the `checkpoints` directory."""
  name = f'{socket.gethostname()}-{os.getpid()}.txt'
  record = pathlib.Path(checkpoints).absolute().parent / 'aborts' / name
  reader, writer = os.pipe()
  # -I: only the standard library is needed, and nothing of the user's environment.
  subprocess.Popen([sys.executable, '-I', __file__, unmet, str(checkpoints), str(record)], stdin=reader)
  os.close(reader)
  os.dup2(writer, sys.stderr.fileno())
  os.close(writer)


def relay(lines: Iterable[str], out: TextIO, unmet: str, checkpoints, record) -> None:
  """Passes `lines` on to `out`, but for the runtime's words on an abort, which one message replaces.

  Which one depends on whether the processes have met before: `unmet`, or what `gone` says; none where this process has
  found a reason itself.  The words left out are kept in the file `record`; where that cannot be written they are passed
  on after all.
  """
  held, fatal, said = [], False, False

  def say() -> None:
    nonlocal said
    if fatal and not said:
      _pass(f'{OWN}{unmet if any(_MEETING in line for line in held) else gone(checkpoints)}\n', out)
      said = True

  for line in lines:
    match = _LOG.match(line)
    if line.startswith(OWN):
      said = True
      _pass(line, out)
    elif held or (match and match['file'] in _PEERS and match['severity'] in 'WEF'):
      held.append(line)
      fatal = fatal or bool(match and match['severity'] == 'F')
    else:
      _pass(line, out)
    # Said at once: a cluster may end what is left of a job as soon as the process itself is over.
    if line.startswith(_END):
      say()
  say()
  if not said or not _kept(held, record):
    out.writelines(held)


def gone(checkpoints) -> str:
  """What has happened where a process is gone, and what to do; `checkpoints` is the directory of the run's."""
  place = pathlib.Path(checkpoints)
  steps = [int(path.name) for path in place.iterdir() if path.name.isdigit()] if place.is_dir() else []
  onward = f'it goes on from step {max(steps)}' if steps else 'there is no checkpoint yet, it begins anew'
  return (
    f'{GONE} (killed, or ended by an error of its own, which its output says), so this one ends too; '
    f'run the same command again on all hosts: {onward}.'
  )


def _pass(line: str, out: TextIO) -> None:
  out.write(line)
  out.flush()


def _kept(held: list[str], record) -> bool:
  try:
    if held:
      pathlib.Path(record).parent.mkdir(parents=True, exist_ok=True)
      pathlib.Path(record).write_text(''.join(held))
  except OSError:
    return False
  return True


if __name__ == '__main__':
  # What ends the run ends this by the end of its input, after the last line.
  for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
    signal.signal(number, signal.SIG_IGN)
  with open(0, errors='replace') as lines:
    relay(lines, sys.stderr, *sys.argv[1:])

"""Progress bars on a terminal, a plain line now and then elsewhere."""

from collections.abc import Iterator
import contextlib
import time

import rich.console
import rich.progress

console = rich.console.Console(highlight=False, soft_wrap=True)
# Bars go to stderr: what a command says on stdout can be piped.
_bars = rich.console.Console(highlight=False, soft_wrap=True, stderr=True)
if not console.is_terminal:
  console.width = 160  # a log has no edge that a table would have to be cut at


def silence() -> None:
  """Nothing is printed any more: of the processes of one run, the first speaks."""
  console.quiet = _bars.quiet = True


class Bar:
  """What `bar` yields: `advance(n, text)` moves it on; `text` stands beside it (a loss, a speed)."""

  def __init__(self, label: str, total: int, start: int, live: rich.progress.Progress | None):
    self._label, self._total, self._done, self._live = label, total, start, live
    self._task = live.add_task(label, total=total, completed=start, text='') if live else None
    self._begun = self._said = time.monotonic()

  def advance(self, count: int = 1, text: str = '') -> None:
    """`count` more are done."""
    self._done += count
    if self._live:
      self._live.update(self._task, advance=count, **({'text': text} if text else {}))
    elif self._done >= self._total or time.monotonic() - self._said > 15:
      self._said = time.monotonic()
      _bars.print(f'{self._label}: {self._done}/{self._total} {text} ({self._said - self._begun:.0f} s)')


@contextlib.contextmanager
def bar(label: str, total: int, start: int = 0) -> Iterator[Bar]:
  """A bar of `total` things of which `start` are done: label, count, text, elapsed and remaining time.

  Off a terminal it prints a line every 15 seconds and at the end.
  """
  if not _bars.is_terminal:
    yield Bar(label, total, start, None)
    return
  columns = (
    rich.progress.TextColumn('{task.description}'),
    rich.progress.BarColumn(),
    rich.progress.MofNCompleteColumn(),
    rich.progress.TextColumn('{task.fields[text]}'),
    rich.progress.TimeElapsedColumn(),
    rich.progress.TextColumn('left'),
    rich.progress.TimeRemainingColumn(),
  )
  with rich.progress.Progress(*columns, console=_bars) as live:
    yield Bar(label, total, start, live)

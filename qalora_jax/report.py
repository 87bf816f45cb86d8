"""Results as data: one JSON form for every measurement, and tables rendered from it."""

from collections.abc import Callable
import contextlib
import datetime
import errno
import importlib.metadata
import json
import os
import pathlib
import platform
import shutil
import subprocess

import jax

_PACKAGES = ('qalora_jax', 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')


def document(command: str, rows: list[dict], **more) -> dict:
  """What is written beside every result: the command, commit, date, machine, versions, and the rows (flat dicts)."""
  return {
    'command': command,
    'commit': commit(),
    'date': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
    'machine': f'{platform.machine()}, {os.cpu_count()} cores, {jax.device_count()} x {jax.devices()[0].device_kind}',
    'versions': {'python': platform.python_version(), **_versions()},
    **more,
    'rows': rows,
  }


def _versions() -> dict[str, str]:
  """The version of every one of _PACKAGES that is installed."""
  installed = {}
  for package in _PACKAGES:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      installed[package] = importlib.metadata.version(package)
  return installed


def commit() -> str | None:
  """The checkout's commit (with + when files differ from it), or None outside a git checkout."""
  if shutil.which('git') is None:
    return None
  here = pathlib.Path(__file__).parent
  git = lambda *words: subprocess.run(('git', '-C', str(here), *words), capture_output=True, text=True, check=False)
  head = git('rev-parse', '--short=12', 'HEAD')
  if head.returncode:
    return None
  return head.stdout.strip() + ('+' if git('status', '--porcelain', '--untracked-files=no').stdout.strip() else '')


def write(path, content: dict) -> None:
  """Writes JSON whole or not at all."""
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  whole(path, lambda partial: partial.write_text(json.dumps(content, indent=2) + '\n'))


def whole(path: pathlib.Path, write: Callable[[pathlib.Path], object]) -> None:
  """Calls `write` with a path beside `path`, and gives what it wrote that name: a file is there whole or not at all.

  Raises OSError, naming `path`, where it cannot be written.
  """
  partial = path.with_name(path.name + '.partial')
  try:
    write(partial)
    partial.replace(path)
  except OSError as error:
    raise _unwritable(path, error) from error


def append(file, data: bytes) -> None:
  """Writes to an unbuffered file at once; raises OSError, naming it, where the system does not take all of it."""
  try:
    if file.write(data) < len(data):
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
  except OSError as error:
    raise _unwritable(file.name, error) from error


def _unwritable(path, error: OSError) -> OSError:
  return OSError(
    f'{path}: cannot be written ({error.strerror or error}). Make room, or make the place writable; then run the same '
    'command again.'
  )


def show(title: str, rows: list[dict]) -> None:
  """Prints rows as a table, the columns in the order of their first appearance; a single row stands upright."""
  # Here, so that results are written on a machine that has jax and flax alone.
  import rich.table

  from qalora_jax import progress

  table = rich.table.Table(title=title, title_justify='left')
  if len(rows) == 1:
    rows = [{'': name, ' ': text(value)} for name, value in rows[0].items()]
  columns = list(dict.fromkeys(key for row in rows for key in row))
  for column in columns:
    numeric = any(isinstance(row.get(column), (int, float)) for row in rows)
    table.add_column(column, justify='right' if numeric else 'left')
  for row in rows:
    table.add_row(*(text(row.get(column)) for column in columns))
  progress.console.print(table)


def publish(place: pathlib.Path, title: str, command: str, rows: list[dict], **settings) -> None:
  """Writes place.json (`document`) and place.md, a table under a line that says where it comes from, and shows it."""
  content = document(command, rows, **settings)
  write(place.with_suffix('.json'), content)
  head = f'`{content["command"]}`, commit {content["commit"]}, {content["date"]}, {content["machine"]}; {settings}\n\n'
  place.with_suffix('.md').write_text(head + markdown(rows))
  show(title, rows)


def markdown(rows: list[dict]) -> str:
  """The rows as a Markdown table."""
  columns = list(dict.fromkeys(key for row in rows for key in row))
  lines = ['| ' + ' | '.join(columns) + ' |', '|' + '---|' * len(columns)]
  lines += ['| ' + ' | '.join(text(row.get(column)) for column in columns) + ' |' for row in rows]
  return '\n'.join(lines) + '\n'


def text(value) -> str:
  """One cell: floats with four decimals (or in powers of ten where those would show nothing), nothing as a dash."""
  if value is None:
    return '–'
  if isinstance(value, bool):
    return 'yes' if value else 'no'
  if isinstance(value, float):
    return f'{value:.4f}' if value == 0 or 1e-3 <= abs(value) < 1e6 else f'{value:.2e}'
  return f'{value:,}' if isinstance(value, int) else str(value)

"""What the runs of a sweep amount to: mean and spread over seeds, as table, CSV, JSON and plot.

Everything is made from records alone, those of finished runs and those that an earlier rendering wrote down: rendering
the same records twice gives the same bytes, and a sweep that is done in part never loses what was measured before.
"""

import csv
import dataclasses
import io
import json
import math
import pathlib
import statistics

from experiments import grids
from experiments import plots
from experiments import runs as runs_lib
from qalora_jax import progress
from qalora_jax import report

SEED = 'seed'
# What a row of the stored JSON holds beside overrides and metrics.
_SOURCE = ('commit', 'date', 'machine')


@dataclasses.dataclass(frozen=True)
class Cell:
  """The runs that differ in their seed alone: mean and sample standard deviation (None for one run) of each metric."""

  overrides: grids.Overrides
  mean: dict[str, float]
  spread: dict[str, float | None]
  count: int


def cells(records: list[runs_lib.Record]) -> list[Cell]:
  """The records by their overrides without the seed, in the order of their first appearance."""
  groups = {}
  for record in records:
    overrides = {key: value for key, value in record.overrides.items() if key != SEED}
    groups.setdefault(json.dumps(overrides, sort_keys=True), (overrides, []))[1].append(record.metrics)
  return [_cell(*group) for group in groups.values()]


def varying(records: list[runs_lib.Record]) -> list[str]:
  """The keys that not all records say alike, but the seed."""
  keys = dict.fromkeys(key for record in records for key in record.overrides if key != SEED)
  return [key for key in keys if len({json.dumps(record.overrides.get(key)) for record in records}) > 1]


def table(records: list[runs_lib.Record]) -> list[dict]:
  """One row a cell: what varies, the number of seeds, and `mean ± spread` of every metric."""
  keys, rows = varying(records), []
  for cell in cells(records):
    row = {key: _number(cell.overrides.get(key)) for key in keys} | {'seeds': cell.count}
    for metric, mean in cell.mean.items():
      spread = cell.spread[metric]
      # A count that all seeds share (bytes, tokens) is no mean.
      counted = isinstance(mean, int) or spread is None
      row[metric] = report.text(mean) + ('' if counted else f' ± {report.text(spread)}')
    rows.append(row)
  return rows


def flat(records: list[runs_lib.Record]) -> list[dict]:
  """One row a cell: all overrides, the number of seeds, and two columns a metric, in full precision."""
  return [
    cell.overrides
    | {'seeds': cell.count}
    | {name: value for key in cell.mean for name, value in ((key, cell.mean[key]), (f'{key} sd', cell.spread[key]))}
    for cell in cells(records)
  ]


def collect(path: pathlib.Path, runs: list[runs_lib.Run]) -> tuple[list[runs_lib.Record], list[runs_lib.Record]]:
  """(the records of `runs`, in their order; records of other runs that `path`, the stored JSON, holds).

  A finished run counts for more than its row in `path`.  ValueError where `path` is no such JSON.
  """
  written = {record.run: record for record in _read(path)}
  found = []
  for run in runs:
    earlier = written.pop(run.name, None)
    record = runs_lib.record(run) if runs_lib.state(run) == runs_lib.DONE else earlier
    found += [record] if record else []
  return found, list(written.values())


def render(
  path: pathlib.Path, title: str, command: str, runs: list[runs_lib.Run],
  x: str | list[str] | None = None, y: str | list[str] | None = None, lines: list[str] | None = None,
) -> None:  # fmt: skip
  """Writes path.{md,csv,json,png} from what is known of `runs`, and shows the table; nothing known: writes nothing."""
  records, others = collect(_beside(path, '.json'), runs)
  state = _standing(runs, records)
  if not records:
    progress.console.print(f'{title}: {state}; nothing to show yet')
    return
  same = {key: value for key, value in records[0].overrides.items() if key not in (*varying(records), SEED)}
  source = {key: sorted({str(record.source[key]) for record in records}) for key in _SOURCE}
  dates = dict.fromkeys((source['date'][0], source['date'][-1]))
  head = f'`{command}`, commit {", ".join(source["commit"])}, {" to ".join(dates)}, {"; ".join(source["machine"])}\n\n'
  head += f'{records[0].recipe}' + (f' with {runs_lib.words(same)}' if same else '') + f'; {state}.\n'
  head += '± is the sample standard deviation over seeds; – is what the recipe says.\n\n'
  rows = table(records)
  content = {
    'command': command, 'commit': ', '.join(source['commit']), 'date': source['date'][-1], 'recipe': records[0].recipe,
    'machine': '; '.join(source['machine']), 'state': state, 'cells': flat(records),
    'rows': [_row(record) for record in records],
  }  # fmt: skip
  # Measured by an earlier form of the sweep: not shown, and not lost.
  content |= {'others': [_row(record) for record in others]} if others else {}
  report.write(_beside(path, '.json'), content)
  report.whole(_beside(path, '.md'), lambda place: place.write_text(head + report.markdown(rows)))
  report.whole(_beside(path, '.csv'), lambda place: place.write_text(_csv(flat(records)), newline=''))
  report.whole(_beside(path, '.png'), lambda place: plots.quality(records, place, x, y, lines))
  report.show(title, rows)
  progress.console.print(f'{state}; {path}.md, .csv, .json and .png')


def _cell(overrides, rows):
  values = {
    key: [row[key] for row in rows if _measured(row.get(key))] for key in dict.fromkeys(k for row in rows for k in row)
  }
  values = {key: found for key, found in values.items() if found}
  # Of a run that diverged there is no spread.
  finite = lambda found: len(found) > 1 and all(map(math.isfinite, found))
  spread = {key: statistics.stdev(found) if finite(found) else None for key, found in values.items()}
  alike = lambda found: isinstance(found[0], int) and len(set(found)) == 1
  mean = {key: found[0] if alike(found) else statistics.fmean(found) for key, found in values.items()}
  return Cell(overrides, mean, spread, len(rows))


def _measured(value):
  return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value):
  """A learning rate in its own digits."""
  return f'{value:g}' if isinstance(value, float) else value


def _standing(runs, records):
  """'12 of 21 runs done, 2 failed, 7 missing'"""
  known = {record.run for record in records}
  failed = sum(runs_lib.state(run) == runs_lib.FAILED for run in runs if run.name not in known)
  parts = [f'{len(known)} of {len(runs)} runs done', f'{failed} failed' * bool(failed)]
  missing = len(runs) - len(known) - failed
  return ', '.join(part for part in (*parts, f'{missing} missing' * bool(missing)) if part)


def _row(record):
  """A record as one flat dict; what was overridden is told apart by its prefix."""
  said = {f'config.{key}': value for key, value in record.overrides.items()}
  return {'run': record.run, 'recipe': record.recipe, **said, **record.metrics, **record.source}


def _read(path):
  """The records of a stored JSON, none where there is no such file."""
  if not path.exists():
    return []
  try:
    content = json.loads(path.read_text())
    return [_record(row) for row in (*content['rows'], *content.get('others', ()))]
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    why = f'{type(error).__name__}: {error}'
    raise ValueError(f'{path}: not the results of a sweep ({why}); restore it or remove it') from None


def _record(row):
  overrides = {key.removeprefix('config.'): value for key, value in row.items() if key.startswith('config.')}
  source = {key: row[key] for key in _SOURCE}
  own = ('run', 'recipe', *_SOURCE)
  metrics = {key: value for key, value in row.items() if key not in own and not key.startswith('config.')}
  return runs_lib.Record(row['run'], row['recipe'], overrides, metrics, source)


def _csv(rows):
  columns = list(dict.fromkeys(key for row in rows for key in row))
  text = io.StringIO()
  writer = csv.DictWriter(text, columns, lineterminator='\n')
  writer.writeheader()
  writer.writerows(rows)
  return text.getvalue()


def _beside(path, suffix):
  # A name may hold dots.
  return path.with_name(path.name + suffix)

"""What a quantization did, for a person to look at: the worst weights, errors over layers, histograms of codes."""

from collections.abc import Iterable
import pathlib
import re

import jax
import numpy as np

from qalora_jax.quant import qtensor

_LAYER = re.compile(r'(?:layers/|((?:en|de)coder/))(\d+)/(.*)')


def measure(rows: list[dict]) -> str:
  """Which error the rows are ordered by: 'output_error' where inputs were looked at, else 'weight_error'."""
  return 'output_error' if rows and all('output_error' in row for row in rows) else 'weight_error'


def worst(rows: list[dict], count: int = 5) -> list[dict]:
  """The `count` rows of the largest error."""
  return sorted(rows, key=lambda row: -row[measure(rows)])[:count]


def plot_errors(rows: list[dict], file: pathlib.Path) -> None:
  """Relative error over layers, a line for every matrix of a block."""
  key, lines = measure(rows), {}
  for row in rows:
    if match := _LAYER.fullmatch(row['weight']):
      lines.setdefault((match[1] or '') + match[3], []).append((int(match[2]), row[key]))
  figure, panel = _panel()
  for matrix, points in lines.items():
    panel.plot(*zip(*sorted(points), strict=True), marker='o', label=matrix)
  panel.set(xlabel='layer', ylabel=f'relative {key.replace("_", " ")}')
  if any(error > 0 for points in lines.values() for _, error in points):
    panel.set_yscale('log')
  panel.xaxis.get_major_locator().set_params(integer=True)
  panel.legend(fontsize=7)
  figure.savefig(file, dpi=120)


def plot_codes(named: Iterable[tuple[str, qtensor.QTensor]], file: pathlib.Path) -> None:
  """The share of every code, a line for each of the named matrices; codes that no weight uses are wasted bits."""
  figure, panel = _panel()
  for name, q in named:
    found, shares = histogram(q)
    panel.plot(found, shares, marker='.', label=f'{name} ({q.bits} bits)')
  panel.set(xlabel='code', ylabel='share of the weights')
  panel.legend(fontsize=7)
  figure.savefig(file, dpi=120)


def histogram(q: qtensor.QTensor) -> tuple[np.ndarray, np.ndarray]:
  """Every code that `q` could hold, and the share of its weights that do."""
  lowest = -(2 ** (q.bits - 1)) if q.levels == 'integer' else 0
  counts = np.zeros(2**q.bits, np.int64)
  # A layer at a time: as integers codes take many times their packed bytes.
  layers = q.shape[0] if len(q.shape) == 3 else None
  for at in (...,) if layers is None else range(layers):
    one = jax.tree.map(lambda leaf, at=at: leaf[at], q)
    counts += np.bincount(np.asarray(qtensor.codes(one)).ravel() - lowest, minlength=2**q.bits)
  return np.arange(2**q.bits) + lowest, counts / counts.sum()


def _panel():
  # Not through pyplot, which would choose a backend for the whole process.
  from matplotlib import figure as figure_lib

  figure = figure_lib.Figure(figsize=(7, 4.5), layout='constrained')
  return figure, figure.add_subplot()

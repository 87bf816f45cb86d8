"""GLUE's tasks and its measures."""

from collections.abc import Sequence
import functools
import math

import numpy as np

from qalora_jax.data import glue
from qalora_jax.data import records
from qalora_jax.evaluate.tasks import task


def accuracy(predicted, labels) -> float:
  """The share of right predictions."""
  return float(np.mean(np.asarray(predicted) == np.asarray(labels)))


def f1(predicted, labels) -> float:
  """2 tp / (2 tp + fp + fn) of class 1; 0 where no prediction and no label is 1."""
  said, true = np.asarray(predicted) == 1, np.asarray(labels) == 1
  both = 2 * np.sum(said & true)
  return float(both / total) if (total := both + np.sum(said != true)) else 0.0


def matthews(predicted, labels) -> float:
  """(tp tn - fp fn) / sqrt((tp + fp)(tp + fn)(tn + fp)(tn + fn)) of two classes; 0 where all are of one class.

  That is their Pearson correlation.
  """
  return pearson(np.asarray(predicted) == 1, np.asarray(labels) == 1)


def pearson(predicted, labels) -> float:
  """sum (x - mean x)(y - mean y) / sqrt(sum (x - mean x)^2 sum (y - mean y)^2); 0 where either does not vary."""
  x, y = (np.asarray(values, np.float64) for values in (predicted, labels))
  if np.ptp(x) == 0 or np.ptp(y) == 0:
    return 0.0
  x, y = x - x.mean(), y - y.mean()
  return float(x @ y / math.sqrt((x @ x) * (y @ y)))


def spearman(predicted, labels) -> float:
  """`pearson` of the ranks, equal values sharing the mean of theirs."""
  return pearson(*(_ranks(np.asarray(values, np.float64)) for values in (predicted, labels)))


def _ranks(values: np.ndarray) -> np.ndarray:
  _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
  last = np.cumsum(counts)
  return (last - (counts - 1) / 2)[which]


_MEASURES = {'accuracy': accuracy, 'f1': f1, 'matthews': matthews, 'pearson': pearson, 'spearman': spearman}


def _documents(one: glue.Task, data: str, split: str, limit: int = 0) -> list[records.Labelled]:
  """The first `limit` (0: all) sentences of a part with their labels, from the hub or the directory `data`."""
  split = task.part(one.name, 'validation', 'validation' if split == 'dev' else split, glue.PARTS)
  path = glue.part(one, data, split) if data else glue.on_hub(one, split)
  return records.read(records.Source(path=path, format=one.name))[: limit or None]


def _metrics(one: glue.Task, outputs: np.ndarray, labels: Sequence[float]) -> dict:
  """GLUE's measures of what a head gives out, [N, labels], and the standard error of an accuracy."""
  if not np.isfinite(outputs).all():
    raise ValueError(f'{one.name}: the model gives out NaN or infinity; it is damaged, or its training diverged')
  predicted = outputs[:, 0] if one.classes == 1 else outputs.argmax(-1)
  found = {name: _MEASURES[name](predicted, labels) for name in one.measures}
  if 'accuracy' in found:
    found['standard_error'] = task.standard_error(found['accuracy'], len(labels))
  return found


TASKS = tuple(
  task.Labelled(
    name=one.name,
    split='validation',
    classes=one.classes,
    documents=functools.partial(_documents, one),
    metrics=functools.partial(_metrics, one),
    words=one.words,
  )
  for one in glue.TASKS.values()
)

"""Tasks of the field by name, and the words that ask for them."""

import difflib
import re

from qalora_jax.evaluate.tasks import commonsense
from qalora_jax.evaluate.tasks import glue
from qalora_jax.evaluate.tasks import mmlu
from qalora_jax.evaluate.tasks import texts
from qalora_jax.evaluate.tasks.task import Item as Item
from qalora_jax.evaluate.tasks.task import Labelled as Labelled
from qalora_jax.evaluate.tasks.task import Task as Task
from qalora_jax.evaluate.tasks.task import Text as Text
from qalora_jax.evaluate.tasks.task import by_group as by_group

TASKS: dict[str, Task | Text | Labelled] = {
  one.name: one for one in (mmlu.TASK, *commonsense.TASKS, *texts.TASKS, *glue.TASKS)
}


def parse(spec: str) -> list[tuple[str, int]]:
  """'mmlu@5, arc_easy' -> [('mmlu', 5), ('arc_easy', 0)]: names and the worked examples before each question.

  Raises ValueError for a name that is unknown, for shots that are no number or that the task cannot have, and for a
  task that is asked for twice with the same shots.
  """
  found = []
  for word in filter(None, map(str.strip, spec.split(','))):
    name, at, shots = (part.strip() for part in word.partition('@'))
    if name not in TASKS:
      close = difflib.get_close_matches(name, TASKS, n=1)
      hint = f'did you mean {close[0]!r}? ' if close else ''
      raise ValueError(f'evaluate.tasks: no task {name!r}; {hint}there are {", ".join(TASKS)}')
    if at and not re.fullmatch(r'\d+', shots, re.ASCII):
      raise ValueError(f'evaluate.tasks: {word!r}: shots are a number, as in {name}@5')
    wanted = int(shots or 0)
    if wanted and not getattr(TASKS[name], 'shots_from', ''):
      raise ValueError(f'evaluate.tasks: {word!r}: {name} has no worked examples; write {name}')
    if (name, wanted) in found:
      raise ValueError(f'evaluate.tasks: {word!r} is asked for twice; leave one away')
    found.append((name, wanted))
  return found

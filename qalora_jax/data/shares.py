"""Documents to examples, each process of a run doing its share; all have all in the end."""

from collections.abc import Callable
import json

import jax
import numpy as np

from qalora_jax import hosts
from qalora_jax.data import examples as examples_lib
from qalora_jax.data import records


def convert(
  read: Callable[[], list[records.Document]], encode: Callable[[records.Document], list[examples_lib.Example]]
) -> list[examples_lib.Example]:
  """The examples of every document, in the documents' order, whatever the number of processes.

  Process p of P tokenizes documents p, p + P, p + 2P, ..., and the examples are exchanged once; so batches, drawn from
  all of them in every process, do not depend on P.  Where `read` or `encode` fails in one process, by ValueError or
  OSError, all raise what it says.  Raises ValueError where the processes do not read equally many documents.
  """
  share, shares = jax.process_index(), jax.process_count()

  def own() -> tuple[int, list[list[examples_lib.Example]]]:
    documents = read()
    return len(documents), [encode(document) for document in documents[share::shares]]

  count, made = hosts.together(own)
  if shares == 1:
    return [example for group in made for example in group]
  return join(hosts.gather(pack(count, made)))


def pack(count: int, groups: list[list[examples_lib.Example]]) -> bytes:
  """A process's share: the number of all documents, and the examples of each that it has made.

  The length of a head as int64, the head as JSON (count, number of groups, {name of a column: its dtype}), then int32:
  the number of examples in each group, and column after column the lengths of all examples; then the columns.
  """
  made = [example for group in groups for example in group]
  dtypes = {name: column.dtype.str for name, column in made[0].items()} if made else {}
  head = json.dumps([count, len(groups), dtypes]).encode()
  sizes = np.array([*map(len, groups), *(len(example[name]) for name in dtypes for example in made)], np.int32)
  columns = [example[name].tobytes() for name in dtypes for example in made]
  return b''.join([np.int64(len(head)).tobytes(), head, sizes.tobytes(), *columns])


def join(shares: list[bytes]) -> list[examples_lib.Example]:
  """The examples of all documents in order, from the shares of all processes in theirs; ValueError as for `convert`."""
  parts = [_unpacked(share) for share in shares]
  counts = [count for count, _ in parts]
  if len(set(counts)) > 1:
    raise ValueError(f'the processes read {counts} documents; the data must be the same on every host')
  dealt = [iter(groups) for _, groups in parts]
  return [example for index in range(counts[0]) for example in next(dealt[index % len(dealt)])]


def _unpacked(share: bytes) -> tuple[int, list[list[examples_lib.Example]]]:
  start = 8 + int(np.frombuffer(share, np.int64, 1)[0])
  count, number, dtypes = json.loads(share[8:start])
  rest = memoryview(share)[start:]

  def take(size: int, dtype='<i4') -> np.ndarray:
    nonlocal rest
    found, rest = np.frombuffer(rest, dtype, size).copy(), rest[size * np.dtype(dtype).itemsize :]
    return found

  groups = take(number)
  lengths = {name: take(groups.sum()) for name in dtypes}
  columns = {
    name: np.split(take(lengths[name].sum(), dtype), np.cumsum(lengths[name])[:-1]) for name, dtype in dtypes.items()
  }
  made = iter([dict(zip(columns, example, strict=True)) for example in zip(*columns.values(), strict=True)])
  return count, [[next(made) for _ in range(size)] for size in groups]

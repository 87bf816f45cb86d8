"""Documents to examples, each process of a run doing its share; all have all in the end."""

from collections.abc import Callable

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

  int32 numbers: count, the number of groups, of examples in each, of tokens in each; then all tokens, then all masks.
  """
  made = [example for group in groups for example in group]
  sizes = [count, len(groups), *map(len, groups), *(len(example['tokens']) for example in made)]
  columns = [example[name] for name in ('tokens', 'loss_mask') for example in made]
  return np.concatenate([np.array(sizes, np.int32), *columns]).tobytes()


def join(shares: list[bytes]) -> list[examples_lib.Example]:
  """The examples of all documents in order, from the shares of all processes in theirs; ValueError as for `convert`."""
  parts = [_unpacked(share) for share in shares]
  counts = [count for count, _ in parts]
  if len(set(counts)) > 1:
    raise ValueError(f'the processes read {counts} documents; the data must be the same on every host')
  dealt = [iter(groups) for _, groups in parts]
  return [example for index in range(counts[0]) for example in next(dealt[index % len(dealt)])]


def _unpacked(share: bytes) -> tuple[int, list[list[examples_lib.Example]]]:
  (count, number), rest = np.split(np.frombuffer(share, np.int32).copy(), [2])
  groups, rest = np.split(rest, [number])
  lengths, rest = np.split(rest, [groups.sum()])
  columns = [np.split(half, np.cumsum(lengths)[:-1]) for half in np.split(rest, 2)]
  made = iter([{'tokens': tokens, 'loss_mask': mask} for tokens, mask in zip(*columns, strict=True)])
  return int(count), [[next(made) for _ in range(size)] for size in groups]

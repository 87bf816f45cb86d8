"""What a compiled program sends between devices, read from its text (`jax.stages.Compiled.as_text()`).

XLA prints a program as computations, each a block of instructions:

    %body (param: (s32[], f32[4,12])) -> (s32[], f32[4,12]) {
      %all-gather.7 = f32[8,12]{1,0} all-gather(%x), channel_id=3, ...
    }
    ENTRY %main (...) -> ... {
      %while.2 = (s32[], f32[4,12]{1,0}) while(%tuple), condition=%condition, body=%body, backend_config={...}
    }
"""

from collections.abc import Iterator
import dataclasses
import math
import re

KINDS = (
  'all-gather',
  'all-reduce',
  'all-to-all',
  'collective-broadcast',
  'collective-permute',
  'ragged-all-to-all',
  'reduce-scatter',
)
_COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.-]+) \(.*\{$')
_INSTRUCTION = re.compile(r'^\s+(?:ROOT )?%?([\w.-]+) = (.*)$')
_ARRAY = re.compile(r'\b(pred|token|[a-z]+\d+\w*)\[([\d,<=]*)\]')
# Those dtypes whose names do not say it.
_BITS = {'pred': 8, 'token': 0}
_CALLED = re.compile(r'\b(?:body|calls|to_apply|true_computation|false_computation)=%?([\w.-]+)')
_BRANCHES = re.compile(r'\bbranch_computations=\{([^}]*)\}')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_BOUND = re.compile(r'compare\(%?[\w.-]+, %?([\w.-]+)\), direction=LT')
# How TPUs overlap a collective with the fusions beside it: every one of them mentions it, one starts it.
_SHARED, _STARTS = '"async_collective_fusion_config"', 'custom_call_target="AsyncCollectiveStart"'


@dataclasses.dataclass(frozen=True)
class Collective:
  """One array that a collective makes on every device: `shape`, `dtype` (XLA's name: f32, bf16, u32) and `bytes`.

  `times`: how often a run of the program makes it, the product of the trip counts of the loops it stands in.
  """

  kind: str
  dtype: str
  shape: tuple[int, ...]
  bytes: int
  times: int


@dataclasses.dataclass(frozen=True)
class _Instruction:
  name: str
  type: str
  operation: str
  rest: str


def of(text: str) -> list[Collective]:
  """Every collective of a compiled program in the order of its text, the parts of a tuple one by one.

  What is started and awaited apart is counted once.  A loop whose text does not say how often it turns counts as
  turning once; on TPU, where the text never says so, its condition i < N is taken to begin at i = 0 and to go in
  steps of 1, as jax's loops do.  Branches of a conditional count as if all were taken.  ValueError for a text without
  an entry computation.
  """
  computations, entry = _parse(text)
  found = []

  def visit(name: str, times: int) -> None:
    inside = computations[name]
    started = ' '.join(each.rest for each in inside if _STARTS in each.rest)
    for each in inside:
      # The result of the pair's second half is the array; that of the first holds its operands too.
      kind = each.operation.removesuffix('-done')
      if kind in KINDS and (_SHARED not in each.rest or re.search(rf'%?{re.escape(each.name)}[,)]', started)):
        found.extend(Collective(kind, *array, times) for array in _arrays(each.type))
      elif each.operation == 'while':
        visit(_CALLED.search(each.rest)[1], times * _trips(each.rest, computations))
      elif not each.operation.endswith(('-done', '-update')):
        for called in _called(each.rest):
          visit(called, times)

  visit(entry, 1)
  return found


def _parse(text: str) -> tuple[dict[str, list[_Instruction]], str]:
  """{computation: its instructions}, and the name of the entry."""
  computations, entry, current = {}, None, None
  for line in text.splitlines():
    if header := _COMPUTATION.match(line):
      current = computations.setdefault(header[2], [])
      entry = header[2] if header[1] else entry
    elif current is not None and (match := _INSTRUCTION.match(line)):
      end = _type_end(match[2])
      operation, _, rest = match[2][end:].strip().partition('(')
      current.append(_Instruction(match[1], match[2][:end], operation, rest))
  if entry is None:
    raise ValueError('the text has no ENTRY computation: it is no compiled program as XLA prints one.')
  return computations, entry


def _type_end(text: str) -> int:
  """Where the type ends with which `text` begins; a tuple's is in parentheses, and so are some layouts."""
  depth = 0
  for at, letter in enumerate(text):
    depth += (letter == '(') - (letter == ')')
    if letter == ' ' and depth == 0:
      return at
  return len(text)


def _arrays(text: str) -> Iterator[tuple[str, tuple[int, ...], int]]:
  """(dtype, shape, bytes) of every array in a type."""
  # Within tuples XLA counts along: /*index=5*/.
  for dtype, sizes in _ARRAY.findall(re.sub(r'/\*.*?\*/', '', text)):
    shape = tuple(int(size.lstrip('<=')) for size in sizes.split(',') if size)
    bits = _BITS[dtype] if dtype in _BITS else int(re.search(r'\d+', dtype)[0])
    yield dtype, shape, -(-math.prod(shape) * bits // 8)


def _called(rest: str) -> list[str]:
  branches = _BRANCHES.search(rest)
  listed = [name.strip().lstrip('%') for name in branches[1].split(',')] if branches else []
  return [*_CALLED.findall(rest), *listed]


def _trips(rest: str, computations: dict[str, list[_Instruction]]) -> int:
  if known := _TRIPS.search(rest):
    return int(known[1])
  condition = computations[re.search(r'\bcondition=%?([\w.-]+)', rest)[1]]
  constants = {each.name: each.rest.partition(')')[0] for each in condition if each.operation == 'constant'}
  bounds = [_BOUND.match(f'{each.operation}({each.rest}') for each in condition]
  limits = [constants[bound[1]] for bound in bounds if bound and bound[1] in constants]
  return int(limits[0]) if len(limits) == 1 else 1

"""Log-probabilities of many continuations, each after its context.

B rows, W tokens of a shared beginning, U tokens after it, P scored places of a row, Q scored tokens, V vocabulary.

What a request costs is the forward over its input, (context + continuation) without the last token; so

  requests of equal inputs are one row (the four letters of a question of MMLU, which differ in the last token only);
  rows that begin alike become one unit (the endings of one context, the questions after the same worked examples):
    their common beginning is read once and its keys and values are kept, what follows it stands in one row of
    segments that see the beginning and themselves.  A row joins a unit where that saves at least half of its tokens.
    With less the unit would not pay: its two parts are padded apart, and its attention is not the fused one.

Rows of like length go through the model together, widths being rounded up to a few sizes that each make one program.
"""

from collections.abc import Collection
from collections.abc import Iterator
from collections.abc import Sequence
import dataclasses
import functools
import math

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from qalora_jax import progress
from qalora_jax import sharding
from qalora_jax import tokenizer as tokenizer_lib
from qalora_jax.models import attention

# Widths are multiples of this many tokens, and of an eighth of the next power of two.
_LEAST = 32
# What a row counts as in the size of a step, at most: windows grow faster than the memory of devices.
_LONGEST = 2048
# Logits of a step on one device, at most (1 GiB of float32); one row is read whatever it holds.
_LOGITS = 2**28


@dataclasses.dataclass(frozen=True)
class Request:
  """The ids of a context and of the continuation that is scored after it; `name` is how errors call it."""

  context: tuple[int, ...]
  continuation: tuple[int, ...]
  name: str = ''

  @property
  def tokens(self) -> tuple[int, ...]:
    """What the model reads: all but the last token."""
    return (self.context + self.continuation)[:-1]


@dataclasses.dataclass(frozen=True)
class Chunk:
  """What one step of the model finished: requests by their index, log p in nats (float64), whether greedy says it."""

  index: np.ndarray
  log_p: np.ndarray
  greedy: np.ndarray


@dataclasses.dataclass(frozen=True)
class _Row:
  """An input that some requests share, and the first of its places that any of them scores."""

  tokens: tuple[int, ...]
  requests: list[int]
  first: int


@dataclasses.dataclass(frozen=True)
class _Unit:
  """Rows whose first `shared` tokens are equal and read once."""

  rows: list[_Row]
  shared: int

  @property
  def rest(self) -> int:
    return sum(len(row.tokens) - self.shared for row in self.rows)

  @property
  def cost(self) -> int:
    """Tokens to read."""
    return self.shared + self.rest


def encode(
  tokenizer: tokenizer_lib.Tokenizer, pairs: Sequence[tuple[str, str]], *, names: Sequence[str] = ()
) -> list[Request]:
  """The requests of (context, continuation) texts, tokenized as lm-evaluation-harness does (TemplateLM._encode_pair).

  White space at the end of the context goes over to the continuation; the continuation's tokens are those of context
  and continuation together, after as many as the context has alone.  Both begin with BOS where there is one.  An empty
  context is BOS alone (EOS where there is no BOS), and the continuation is tokenized by itself.

  BOS stands wherever tokenizer_config.json (or config.json) names one, as in training (`data.examples`), also where
  transformers would leave it out because add_bos_token or the post-processor of tokenizer.json say so.

  `names` says of every pair what errors call it, before the first characters of its text.

  Raises ValueError for a continuation without a token of its own, and for an empty context without BOS and EOS.
  """
  bos = [] if tokenizer.bos is None else [tokenizer.bos]
  ids = functools.lru_cache(maxsize=64)(tokenizer.encode)
  made = []
  for (context, continuation), name in zip(pairs, names or [''] * len(pairs), strict=True):
    text = context + continuation
    name = f'{name}: {text[:60]}' if name else text[:60]
    if context:
      before = [*bos, *ids(context.rstrip())]
      after = [*bos, *tokenizer.encode(text)][len(before) :]
    else:
      before, after = [], ids(continuation)
    if not before:
      before = bos or [tokenizer.eos]
      # A continuation that spells BOS out has it as its context.
      after = after[1:] if after[:1] == before else after
    if before == [None]:
      raise ValueError(f'{name!r}: nothing stands before it, and the tokenizer has neither BOS nor EOS.')
    if not after:
      raise ValueError(f'{name!r}: its continuation {continuation!r} has no token; nothing can be scored.')
    made.append(Request(tuple(before), tuple(after), name))
  return made


def fit(
  requests: Sequence[Request], *, window: int, overflow: str, bos: int | None
) -> tuple[list[Request], np.ndarray]:
  """The requests as they go through a model of `window` tokens, and which of them were cut for that.

  overflow 'error': ValueError for the first input that is longer.  'cut': the front of its context goes, BOS stays.
  ValueError under both where a continuation leaves no token of the context in the window.
  """
  made, cut = [], np.zeros(len(requests), bool)
  for index, request in enumerate(requests):
    over = len(request.tokens) - window
    if over > 0:
      kept = int(bos is not None and request.context[0] == bos)
      if overflow == 'error':
        raise ValueError(
          f'{request.name!r} ... has {len(request.tokens)} tokens, and the model a window of {window}: set '
          'evaluate.overflow=cut (its front is cut), or choose a model of a longer window.'
        )
      if len(request.context) <= over:
        raise ValueError(
          f'{request.name!r} ...: its continuation has {len(request.continuation)} tokens, which leave nothing of its '
          f'context in the window of {window}; choose a model of a longer window.'
        )
      request = dataclasses.replace(request, context=request.context[:kept] + request.context[kept + over :])
      cut[index] = True
    made.append(request)
  return made, cut


def score(model: nn.Module, variables: dict, requests: Sequence[Request], **settings) -> tuple[np.ndarray, np.ndarray]:
  """(log p in nats, float64; whether greedy decoding would say it), both in the order of the requests; see `chunks`."""
  log_p, greedy = np.zeros(len(requests)), np.zeros(len(requests), bool)
  for chunk in chunks(model, variables, requests, **settings):
    log_p[chunk.index], greedy[chunk.index] = chunk.log_p, chunk.greedy
  return log_p, greedy


def chunks(
  model: nn.Module,
  variables: dict,
  requests: Sequence[Request],
  *,
  window: int,
  batch: int,
  mesh: jax.sharding.Mesh,
  label: str = 'log-likelihood',
  done: Collection[int] = (),
) -> Iterator[Chunk]:
  """log p(continuation | context) = sum_t log p(token t | all before it) of every request, step by step.

  A step has about `batch` * min(window, 2048) tokens, whatever the length of its rows, which the mesh divides, and 2^28
  logits a device at most; one row a device where that alone is more.  Steps of which all requests are `done` (by index)
  are left out, the others are what they would be without: a run that goes on where another stopped gives the same
  numbers.

  Raises ValueError for a request that has no context or no continuation, or does not fit the window (`fit` first), and
  for one whose log p is no finite number, before its step is given out.
  """
  for request in requests:
    if not request.context or not request.continuation or len(request.tokens) > window:
      raise ValueError(
        f'{request.name!r} ... has {len(request.context)} + {len(request.continuation)} tokens; a request has one of '
        f'each at least, and all but the last fit the window of {window}.'
      )
  program, done, vocabulary = _compiled(model, mesh), set(done), model.config.vocab_size
  shares = mesh.shape['data'] * mesh.shape['fsdp']
  with progress.bar(label, len(requests), start=len(done)) as bar:
    waiting = None
    for units, shape in _steps(requests, window, batch, shares, vocabulary):
      indices = [request for unit in units for row in unit.rows for request in row.requests]
      if done.issuperset(indices):
        continue
      arrays, slots = _arrays(units, shape, requests)
      # Begun before its predecessor is looked at, so that the device never waits for this program.
      following = program(variables, arrays), slots, indices
      if waiting is not None:
        yield _finished(*waiting, requests, bar, done)
      waiting = following
    if waiting is not None:
      yield _finished(*waiting, requests, bar, done)


def _finished(results, slots, indices, requests: Sequence[Request], bar: progress.Bar, done: set[int]) -> Chunk:
  log_p_BQ, greedy_BQ = jax.device_get(results)
  log_p = [log_p_BQ[row, own].astype(np.float64).sum() for row, own in slots]
  for index, value in zip(indices, log_p, strict=True):
    # The softmax of finite logits has no zero, and argmax takes NaN for an answer.
    if not np.isfinite(value):
      raise ValueError(
        f'{requests[index].name!r} ...: log p is {value}; the model does not compute finite numbers.  Look at its '
        'weights, and at model.dtype.'
      )
  greedy = [greedy_BQ[row, own].all() for row, own in slots]
  bar.advance(len(set(indices) - done))
  return Chunk(np.array(indices), np.array(log_p), np.array(greedy))


@functools.lru_cache(maxsize=4)
def _compiled(model: nn.Module, mesh):
  """One jitted function a model; it makes a program for every shape that it meets."""
  return jax.jit(sharding.over(mesh, functools.partial(_score, model)), in_shardings=(None, sharding.batch(mesh)))


def _score(model: nn.Module, variables: dict, batch: dict) -> tuple[jax.Array, jax.Array]:
  """log p [B, Q] float32 of the tokens `target` at the places only[where], and whether each is the likeliest there."""
  past = {}
  if 'beginning' in batch:
    nowhere_B1 = jnp.zeros((len(batch['beginning']), 1), jnp.int32)
    _, made = model.apply(variables, batch['beginning'], only_BP=nowhere_B1, mutable=[attention.PRESENT])
    past = {attention.PAST: made[attention.PRESENT]} if attention.PRESENT in made else {}
  logits_BPV = model.apply(
    {**variables, **past}, batch['tokens'], batch['segments'], batch['positions'], only_BP=batch['only']
  )
  at = lambda values_BP: jnp.take_along_axis(values_BP, batch['where'], axis=1)
  # By two indices: one into P * V might not fit int32.
  chosen_BQ = jax.vmap(lambda logits_PV, where_Q, target_Q: logits_PV[where_Q, target_Q])(
    logits_BPV, batch['where'], batch['target']
  )
  log_p_BQ = chosen_BQ - at(jax.nn.logsumexp(logits_BPV, axis=-1))
  return log_p_BQ, at(jnp.argmax(logits_BPV, axis=-1)) == batch['target']


def _rows(requests: Sequence[Request]) -> list[_Row]:
  """The different inputs, in the order in which those that begin alike are neighbours."""
  sharing: dict[tuple[int, ...], list[int]] = {}
  for index, request in enumerate(requests):
    sharing.setdefault(request.tokens, []).append(index)
  return [
    _Row(tokens, indices, min(len(requests[index].context) - 1 for index in indices))
    for tokens, indices in sorted(sharing.items())
  ]


def _units(rows: Sequence[_Row], window: int) -> list[_Unit]:
  """Rows joined where it pays; what follows a shared beginning takes `window` // 2 tokens at most."""
  units: list[_Unit] = []
  for row in rows:
    alone = _Unit([row], 0)
    if units:
      last = units[-1]
      limit = min(row.first, last.shared or last.rows[0].first)
      joint = _Unit([*last.rows, row], _common(last.rows[-1].tokens, row.tokens, limit))
      if joint.shared and joint.rest <= window // 2 and 2 * (joint.cost - last.cost) <= alone.cost:
        units[-1] = joint
        continue
    units.append(alone)
  return units


def _common(one: tuple[int, ...], other: tuple[int, ...], limit: int) -> int:
  """How many of their first `limit` tokens are equal."""
  return next((n for n, (a, b) in enumerate(zip(one[:limit], other, strict=False)) if a != b), min(limit, len(other)))


def _steps(
  requests, window: int, batch: int, shares: int, vocabulary: int
) -> Iterator[tuple[list[_Unit], tuple[int, ...]]]:
  """(units, (B, W, U, P, Q)) of every step, the widest first: what does not fit into memory does so at once."""
  usual = min(window, _LONGEST)
  alike: dict[tuple[int, int], list[_Unit]] = {}
  for unit in _units(_rows(requests), usual):
    rest = _power(unit.rest) if unit.shared else min(_up(unit.rest), window)
    beginning = min(_up(unit.shared), window) if unit.shared else 0
    alike.setdefault((beginning, rest), []).append(unit)
  for (W, U), units in sorted(_merged(alike, usual * batch).items(), key=lambda entry: -sum(entry[0])):
    units.sort(key=lambda unit: unit.rows[0].requests[0])
    places = [_places(unit, requests) for unit in units]
    P = min(_power(max(len({place for place, _ in found}) for found in places), 1), U)
    Q = _power(max(map(len, places)), 1)
    rows = min(max(batch * usual // (W + U), 1), _power(len(units), 1))
    rows = min(rows, max(_LOGITS // (P * vocabulary), 1) * shares)
    rows = math.ceil(rows / shares) * shares
    for start in range(0, len(units), rows):
      yield units[start : start + rows], (rows, W, U, P, Q)


def _merged(alike: dict[tuple[int, int], list[_Unit]], tokens: int) -> dict[tuple[int, int], list[_Unit]]:
  """The units by their widths (W, U); those that do not fill a step of so many tokens go with wider ones.

  To make one more program takes longer than to read the padding of less than a step.
  """
  merged: dict[tuple[int, int], list[_Unit]] = {}
  for shared in (False, True):
    widths, units = (0, 0), []
    own = sorted(width for width in alike if bool(width[0]) == shared)
    for W, U in own:
      widths, units = (max(widths[0], W), max(widths[1], U)), units + alike[W, U]
      if len(units) * sum(widths) >= tokens or own[-1] == (W, U):
        merged.setdefault(widths, []).extend(units)
        widths, units = (0, 0), []
  return merged


def _scored(unit: _Unit, requests: Sequence[Request]) -> Iterator[tuple[int, list[tuple[int, int]]]]:
  """(request, [(place after the shared beginning, target), ...]) of every request, row by row."""
  begin = 0
  for row in unit.rows:
    for index in row.requests:
      first = begin + len(requests[index].context) - 1 - unit.shared
      yield index, [(first + n, token) for n, token in enumerate(requests[index].continuation)]
    begin += len(row.tokens) - unit.shared


def _places(unit: _Unit, requests: Sequence[Request]) -> dict[tuple[int, int], int]:
  """{(place, target): its number} of all that the unit's requests ask for, each once."""
  asked = dict.fromkeys(pair for _, pairs in _scored(unit, requests) for pair in pairs)
  return {pair: number for number, pair in enumerate(asked)}


def _arrays(units: Sequence[_Unit], shape: tuple[int, ...], requests: Sequence[Request]):
  """The step's arrays, and for every request (its row, the numbers of its tokens among the row's Q)."""
  B, W, U, P, Q = shape
  widths = {'beginning': W, 'tokens': U, 'segments': U, 'positions': U, 'only': P, 'where': Q, 'target': Q}
  arrays = {name: np.zeros((B, width), np.int32) for name, width in widths.items() if width}
  slots = []
  for b, unit in enumerate(units):
    if unit.shared:
      arrays['beginning'][b, : unit.shared] = unit.rows[0].tokens[: unit.shared]
    begin = 0
    for segment, row in enumerate(unit.rows, start=1):
      own = slice(begin, begin + len(row.tokens) - unit.shared)
      arrays['tokens'][b, own] = row.tokens[unit.shared :]
      arrays['segments'][b, own] = segment
      arrays['positions'][b, own] = np.arange(unit.shared, len(row.tokens))
      begin = own.stop
    numbers = _places(unit, requests)
    only = sorted({place for place, _ in numbers})
    arrays['only'][b, : len(only)] = only
    arrays['where'][b, : len(numbers)] = np.searchsorted(only, [place for place, _ in numbers])
    arrays['target'][b, : len(numbers)] = [token for _, token in numbers]
    slots += [(b, [numbers[pair] for pair in pairs]) for _, pairs in _scored(unit, requests)]
  return arrays, slots


def _up(tokens: int) -> int:
  step = max(_LEAST, _power(tokens) // 8)
  return math.ceil(tokens / step) * step


def _power(count: int, least: int = _LEAST) -> int:
  """The next power of two, `least` at least."""
  return max(least, 2 ** math.ceil(math.log2(count)))

"""One pass over a model, block by block: calibration inputs in, quantized weights out.

Memory holds one dense block and the activations of the samples before it, and what is quantized so far; that is on disk
too, and a pass that was cut short goes on after its last finished layer.

N samples, T tokens, D model, I inputs of a matrix.
"""

from collections.abc import Callable
from collections.abc import Iterable
import dataclasses
import functools
import json
import math
import pathlib
import time

from flax import linen as nn
from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from qalora_jax import families
from qalora_jax import hf
from qalora_jax import layout
from qalora_jax import sharding
from qalora_jax import tensors
from qalora_jax.adapters import residual
from qalora_jax.models import layers
from qalora_jax.models import linear
from qalora_jax.quant import affine
from qalora_jax.quant import allocate
from qalora_jax.quant import errors
from qalora_jax.quant import method as method_lib
from qalora_jax.quant import qtensor

_EXACT = jax.lax.Precision.HIGHEST
_WHOLE = '__call__'
_SETTINGS, _CHOSEN = 'settings.json', 'chosen.json'
# The name under which a weight's rule is looked for: the whole name and nothing else.
_EXACTLY = '^{}$'


@dataclasses.dataclass(frozen=True)
class Beginning:
  """How adapters begin, see `residual.initialize`; `seed` draws what no error decides."""

  kind: str
  iterations: int
  seed: int


@dataclasses.dataclass(frozen=True)
class Result:
  """The 'frozen' collection, the adapters to begin with ({}: none), one report row a matrix, both on the host."""

  frozen: dict
  params: dict
  rows: list[dict]


class Activations:
  """The inputs of the block at hand for all samples, on the mesh, in batches of equal size.

  Rows that only fill the last batch carry no weight.
  """

  def __init__(self, config: layers.Config, others: dict, samples_NT: np.ndarray, batch: int, mesh):
    self._config, self._others = dataclasses.replace(config, remat='none'), others
    shares = mesh.shape['data'] * mesh.shape['fsdp']
    batch = -(-min(batch, len(samples_NT)) // shares) * shares
    rows = sharding.batch(mesh)
    model = families.of(config).module(self._config)
    embed = jax.jit(functools.partial(model.apply, method='embed'), out_shardings=rows)
    self._real, self._x = [], []
    for begin in range(0, len(samples_NT), batch):
      tokens = samples_NT[begin : begin + batch]
      filled = np.concatenate([tokens, np.repeat(tokens[:1], batch - len(tokens), axis=0)])
      self._real.append(jax.device_put((np.arange(batch) < len(tokens)).astype(np.float32), rows))
      self._x.append(embed({'frozen': others}, jax.device_put(filled, rows)))
    self._tokens = samples_NT.size

  def hessians(self, layer: int, block: dict, matrices: Iterable[str], part: str = _WHOLE) -> dict[str, jax.Array]:
    """{matrix: mean of x x^T [I, I]} over the tokens of all samples, x the inputs of the block's `matrices`.

    `part`: the method of Block that is at hand, 'attend' or 'feed', when the block is gone through in parts.
    """
    matrices = tuple(matrices)
    sums = None
    for x, real in zip(self._x, self._real, strict=True):
      found = _moments(self._config, part, matrices, layer, block, x, real)
      sums = found if sums is None else jax.tree.map(jnp.add, sums, found)
    return jax.tree.map(lambda total: total / self._tokens, sums)

  def advance(self, layer: int, block: dict, part: str = _WHOLE) -> None:
    """On to the inputs of the next block or part, or of the last norm."""
    self._x = [_forward(self._config, part, layer, block, x) for x in self._x]

  def head_hessian(self) -> jax.Array:
    """Mean of x x^T [D, D] over the inputs of the head, after the last block."""
    model = families.of(self._config).module(self._config)

    @jax.jit
    def moment(x, real):
      y = model.apply({'frozen': self._others}, x, method='normed').astype(jnp.float32) * real[:, None, None]
      return jnp.einsum('btd,bte->de', y, y, precision=_EXACT)

    return sum(moment(x, real) for x, real in zip(self._x, self._real, strict=True)) / self._tokens


def quantize(
  source: hf.Source,
  config: layers.Config,
  scheme: linear.Scheme,
  samples_NT: np.ndarray | None,
  *,
  mesh: jax.sharding.Mesh,
  batch: int = 8,
  true_sequential: bool = True,
  beginning: Beginning | None = None,
  budget: float = 0.0,
  partial: pathlib.Path,
  settings: dict,
  progress: Callable[..., None] | None = None,
) -> Result:
  """Every weight of `source` as `scheme` says, layer by layer.

  With samples, a matrix sees the inputs that the quantized layers before it make and, where `true_sequential`, those
  that the matrices before it in its own block make (GPTQ's released code).  With `beginning`, each adapted matrix is
  quantized together with the adapter that makes good its error.  With a `budget` in bits per weight, bits are chosen
  first, see `choose_bits`.

  `partial` is a directory for finished layers: a later call with equal `settings` (JSON) goes on after them; others
  are refused.  The caller removes it when the result is safe.  `progress(text=...)` is called after every layer.
  Raises ValueError for what no quantizer can do, naming the weight.
  """
  source.check()
  if samples_NT is not None:
    check_stacks(config, 'calibration')
  if samples_NT is None and any(getattr(method, 'calibrated', False) for _, method in scheme.quantizers):
    raise ValueError('what GPTQ and refined offsets look at is missing: name some text in calibration.text.path.')
  if budget:
    _check_budget(source, config, scheme, budget)
  _claim(partial, settings)
  others = {path: source.read(path, name) for path, name in _others(config)}
  others = {path: leaf.astype(scheme.frozen_dtype) for path, leaf in others.items()}
  outside = traverse_util.unflatten_dict({p: leaf for p, leaf in others.items() if p != _HEAD}, sep='/')
  activations = lambda: Activations(config, outside, samples_NT, batch, mesh)
  if budget:
    chosen = choose_bits(source, config, scheme, activations(), budget, partial, progress)
    quantizers = tuple((_EXACTLY.format(name), method) for name, method in chosen.items())
    scheme = dataclasses.replace(scheme, quantizers=(*quantizers, *scheme.quantizers))
  running = None if samples_NT is None else activations()
  made_layers, rows = {stack: [] for stack in config.depths}, []
  places = [(stack, layer) for stack, depth in config.depths.items() for layer in range(depth)]
  for number, (stack, layer) in enumerate(places):
    file = partial / f'layer-{number:05d}.safetensors'
    if file.is_file():
      made, found = _restore(file, scheme, source.shapes, stack, layer, beginning)
      if running is not None:
        # In the same steps as when it was made, so that it rounds alike.
        for part in _sequence(config) if true_sequential else (_WHOLE,):
          running.advance(layer, _dense(made), part)
    else:
      made, found = _layer(source, config, scheme, stack, layer, number, running, mesh, true_sequential, beginning)
      _keep(file, made, found)
    made_layers[stack].append(made)
    rows += found
    if progress is not None:
      progress(text=_said(found))
  if _HEAD in others and (method := scheme.quantizer('lm_head')):
    hessian = None if running is None else running.head_hessian()
    w = source.read(_HEAD, families.of(config).names(config)[_HEAD]).astype(np.float32)
    begun, head = time.monotonic(), method(jnp.asarray(w), 'lm_head', hessian)
    rows.append(_row('lm_head', head, _as_dense(head), w, hessian) | {'seconds': round(time.monotonic() - begun, 3)})
    others[_HEAD] = jax.device_get(head)
  trees = [_stack(made_layers, scheme, config, collection) for collection in ('frozen', 'params')]
  return Result(trees[0] | traverse_util.unflatten_dict(others, sep='/'), trees[1], rows)


def check_stacks(config: layers.Config, asked: str) -> None:
  """ValueError, naming what was `asked` for, of a model whose layers' inputs are not those of one stack."""
  if list(config.depths) != [linear.STACK]:
    raise ValueError(
      f'{asked}: looks at activations, which are gone through for one stack of layers, and a model of type '
      f'{config.family!r} has {" and ".join(config.depths)}: set base.method = "affine", "nf4" or "fp4" without '
      'base.refine and base.budget (in base.rules too), adapter.init other than "calibrated", and no calibration.text.'
    )


def choose_bits(
  source: hf.Source,
  config: layers.Config,
  scheme: linear.Scheme,
  inputs: Activations,
  budget: float,
  partial: pathlib.Path,
  progress: Callable[..., None] | None = None,
) -> dict[str, method_lib.Method]:
  """{weight: method} with 8, 4, 3 or 2 bits each, the summed relative output error least within `budget`.

  Every quantized weight is quantized in each of the four widths on the inputs of the dense model; an integer linear
  programme picks one width a weight (as LQ-LoRA, Guo et al., 2023, does for its weight errors) so that their stored
  bits, scales and offsets counted, come to at most `budget` per weight.
  """
  file, widths = partial / _CHOSEN, _widths(config, scheme)
  if not file.is_file():
    candidates = []
    lines = [alike for steps in _sequence(config).values() for alike in steps]
    for layer in range(config.depths[linear.STACK]):
      dense = _read_layer(source, config, linear.STACK, layer)
      hessians = inputs.hessians(layer, _block(dense), [alike[0] for alike in lines])
      for alike in lines:
        for matrix in alike:
          name = f'{linear.STACK}/{layer}/{matrix}'
          if name not in widths:
            continue
          w, costs, lost = dense[f'{matrix}/kernel'], {}, {}
          for bits, method in widths[name].items():
            q = method(w, name, hessians[alike[0]])
            costs[bits] = round(qtensor.bits_per_weight(q) * q.size)
            lost[bits] = float(errors.relative_output_error(qtensor.dequantize(q), w, hessians[alike[0]]))
          candidates.append(allocate.Candidate(name, w.size, costs, lost))
      inputs.advance(layer, _block(dense))
      if progress is not None:
        progress(text='weighing bits', count=0)
    tensors.write_json(file, allocate.allocate(candidates, budget))
  return {name: widths[name][bits] for name, bits in tensors.read_json(file).items()}


def _widths(config, scheme) -> dict[str, dict[int, method_lib.Method]]:
  """{weight: {bits: method}} of all that may be chosen; a table's codes have their one width."""
  found = {}
  for layer in range(config.depths[linear.STACK]):
    for matrix in linear.matrices(_sequence(config)):
      name = f'{linear.STACK}/{layer}/{matrix}'
      method = scheme.quantizer(name)
      if method is not None:
        found[name] = {method.quantizer.bits: method}
        if isinstance(method.quantizer, affine.Affine):
          found[name] = {bits: _with_bits(method, bits) for bits in qtensor.PLANES}
  return found


def _with_bits(method: method_lib.Method, bits: int) -> method_lib.Method:
  return dataclasses.replace(method, quantizer=dataclasses.replace(method.quantizer, bits=bits))


def _check_budget(source: hf.Source, config, scheme, budget: float) -> None:
  """ValueError for a budget that no choice of bits can keep: what they cost follows from the shapes."""
  if _HEAD in source.shapes and scheme.quantizer('lm_head') is not None:
    raise ValueError(
      'base.budget chooses bits for the projections of the blocks alone: leave lm_head out of base.targets and '
      'base.rules, or set base.budget = 0.'
    )
  candidates = []
  for name, widths in _widths(config, scheme).items():
    w = jax.ShapeDtypeStruct(source.shapes[f'{linear.STACK}/{name.split("/", 2)[2]}/kernel'], jnp.float32)
    made = {bits: jax.eval_shape(functools.partial(_blank_of, method, name), w) for bits, method in widths.items()}
    costs = {bits: round(qtensor.bits_per_weight(q) * q.size) for bits, q in made.items()}
    candidates.append(allocate.Candidate(name, math.prod(w.shape), costs, dict.fromkeys(costs, 0.0)))
  allocate.allocate(candidates, budget)


def _blank_of(method: method_lib.Method, name: str, w) -> qtensor.QTensor:
  return method(w, name)


_HEAD = 'lm_head/kernel'


def _sequence(config: layers.Config) -> dict:
  return config.sequence[linear.STACK]


def _others(config) -> list[tuple[str, str]]:
  """(path, name) of what is in no layer."""
  return [(path, of_path[0]) for path, of_path in layout.names(config).items() if not layout.is_stacked(path)]


def _read_layer(source: hf.Source, config: layers.Config, stack: str, layer: int) -> dict[str, np.ndarray]:
  """{path within the block: float32 weight} of one layer."""
  return {
    path.partition('/')[2]: source.read(path, name.format(layer)).astype(np.float32)
    for path, name in families.of(config).names(config).items()
    if path.startswith(f'{stack}/')
  }


def _block(flat: dict) -> dict:
  return traverse_util.unflatten_dict(flat, sep='/')


def _layer(
  source, config, scheme, stack, layer, number, running, mesh, true_sequential, beginning
) -> tuple[dict, list[dict]]:
  """({'frozen': ..., 'params': ...} of one layer, flat and on the host, and its report rows).

  `number`: of the layer among those of all stacks.  Leaves `running` at the inputs of the next layer.
  """
  dense, sequence = _read_layer(source, config, stack, layer), config.sequence[stack]
  # What later matrices and blocks see of each weight: what the model will compute with when training begins.
  seen = {path: leaf.astype(scheme.frozen_dtype) for path, leaf in dense.items()}
  frozen, params, rows = {}, {}, []
  hessians = {}
  if running is not None and not true_sequential:
    hessians = running.hessians(layer, _block(seen), [alike[0] for steps in sequence.values() for alike in steps])
  for part, steps in sequence.items():
    for alike in steps:
      if running is not None and true_sequential:
        hessians = running.hessians(layer, _block(seen), alike[:1], part)
      for matrix in alike:
        name, path = f'{stack}/{layer}/{matrix}', f'{matrix}/kernel'
        method, hessian = scheme.quantizer(name), hessians.get(alike[0])
        begins = beginning if scheme.adapts(name) else None
        if method is None and begins is None:
          continue
        begun = time.monotonic()
        w = jax.device_put(dense[path], _columns(dense[path].shape, mesh))
        q, node = _one(scheme, name, w, hessian, begins, number * len(linear.matrices(sequence)) + len(rows))
        frozen[path] = q
        if node is not None:
          params[f'{matrix}/adapter'] = node
        seen[path] = _as_dense(q if node is None else node.merge(q))
        rows.append(_row(name, q, seen[path], w, hessian) | {'seconds': round(time.monotonic() - begun, 3)})
    if running is not None and true_sequential:
      running.advance(layer, _block(seen), part)
  if running is not None and not true_sequential:
    running.advance(layer, _block(seen))
  frozen |= {path: leaf for path, leaf in seen.items() if path not in frozen}
  return {'frozen': jax.device_get(frozen), 'params': jax.device_get(params)}, rows


def _one(scheme, name, w, hessian, begins: Beginning | None, index: int) -> tuple:
  """(frozen matrix, adapter that begins with its error or None)."""
  method = scheme.quantizer(name)
  if begins is None:
    return method(w, name, hessian), None
  quantize = None if method is None else lambda w: method(w, name, hessian)
  key = jax.random.fold_in(jax.random.key(begins.seed), index)
  q, node = residual.initialize(
    begins.kind, scheme.adapter, w, quantize, hessian, iterations=begins.iterations, key=key
  )
  # A matrix that stays dense is stored, and so seen, in frozen_dtype.
  return q if isinstance(q, qtensor.QTensor) else q.astype(scheme.frozen_dtype), node


def _row(name: str, q, seen, w, hessian) -> dict:
  """What became of one weight: relative errors of the weight and, with a Hessian, of its output."""
  stored = isinstance(q, qtensor.QTensor)
  row = {
    'weight': name,
    'levels': q.levels if stored else 'dense',
    'bits': q.bits if stored else None,
    'group': q.group if stored else None,
    'bits_per_weight': qtensor.bits_per_weight(q) if stored else 8.0 * q.dtype.itemsize,
    'weight_error': float(errors.weight_error(seen, w)),
  }
  if hessian is not None:
    row['output_error'] = float(errors.relative_output_error(seen, w, hessian))
  return row


def _said(rows: list[dict]) -> str:
  """The worst of a layer in a few words."""
  key = 'output_error' if rows and 'output_error' in rows[0] else 'weight_error'
  return f'{key} up to {max(row[key] for row in rows):.2e}' if rows else ''


def _as_dense(node) -> jax.Array:
  return qtensor.dequantize(node) if isinstance(node, qtensor.QTensor) else node


def _dense(made: dict) -> dict:
  """The block that computes what the quantized and adapted one does, as a tree of dense weights."""
  flat = {path: _as_dense(leaf) for path, leaf in made['frozen'].items()}
  for path, node in made['params'].items():
    kernel = path.removesuffix('adapter') + 'kernel'
    flat[kernel] = _as_dense(node.merge(made['frozen'][kernel]))
  return _block(flat)


def _columns(shape: tuple[int, ...], mesh) -> jax.sharding.NamedSharding:
  """Outputs over all devices, whose columns never meet in any quantizer; whole where they do not divide."""
  split = shape[-1] % mesh.size == 0
  return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, mesh.axis_names if split else None))


def _stack(made: dict[str, list[dict]], scheme: linear.Scheme, config: layers.Config, collection: str) -> dict:
  """The tree of one collection, neighbours that are alike stacked."""
  tree = {}
  for stack, starts in scheme.starts(config).items():
    ends = [*starts[1:], len(made[stack])]
    for name, start, stop in zip(linear.stacks(starts, stack), starts, ends, strict=True):
      own = [layer[collection] for layer in made[stack][start:stop]]
      if own[0]:
        tree[name] = _block(jax.tree.map(lambda *leaves: np.stack(leaves), *own))
  return tree


def _claim(partial: pathlib.Path, settings: dict) -> None:
  """Makes the directory of finished layers, or takes up one of equal settings or without any."""
  file = partial / _SETTINGS
  begun = any(partial.glob('layer-*')) or (partial / _CHOSEN).is_file()
  same = file.is_file() and tensors.read_json(file) == json.loads(json.dumps(settings))
  if begun and not same:
    raise ValueError(
      f'{partial} holds an unfinished quantization of other settings; remove it to begin anew, or write to another '
      'directory.'
    )
  partial.mkdir(parents=True, exist_ok=True)
  if not same:
    tensors.write_json(file, settings)


def _keep(file: pathlib.Path, made: dict, rows: list[dict]) -> None:
  """Writes a finished layer; the file is there when it is whole."""
  named = jax.tree_util.tree_leaves_with_path(made)
  leaves = {jax.tree_util.keystr(path, simple=True, separator=' '): leaf for path, leaf in named}
  tensors.save_file(file, leaves, metadata={'rows': json.dumps(rows)})


def _restore(file: pathlib.Path, scheme, shapes, stack: str, layer: int, beginning) -> tuple[dict, list[dict]]:
  """The layer that `_keep` wrote; what it consists of follows from the scheme."""
  blank = jax.eval_shape(functools.partial(_blank, scheme, shapes, stack, layer, beginning))
  leaves = tensors.load_file(file)
  named = jax.tree_util.tree_leaves_with_path(blank)
  made = [leaves[jax.tree_util.keystr(path, simple=True, separator=' ')] for path, _ in named]
  return jax.tree.unflatten(jax.tree.structure(blank), made), json.loads(tensors.metadata(file)['rows'])


def _blank(scheme, shapes, stack: str, layer: int, beginning) -> dict:
  """A layer of zeros in the structure that `_layer` returns."""
  frozen, params = {}, {}
  for path, shape in shapes.items():
    part, _, within = path.partition('/')
    if part != stack:
      continue
    name = f'{stack}/{layer}/{layout.module(within)}'
    method = scheme.quantizer(name) if layout.is_matrix(path) else None
    w = jnp.zeros(shape)
    frozen[within] = w.astype(scheme.frozen_dtype) if method is None else method(w, name)
    if beginning is not None and layout.is_matrix(path) and scheme.adapts(name):
      node = nn.unbox(scheme.adapter.init(jax.random.key(0), frozen[within], (None, None)))
      params[f'{layout.module(within)}/adapter'] = node
  return {'frozen': frozen, 'params': params}


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _moments(
  config: layers.Config, part: str, matrices: tuple[str, ...], layer, block: dict, x_BTD, real_B
) -> dict[str, jax.Array]:
  """{matrix: sum of x x^T [I, I]} over the real rows, in float32; the compiler drops what lies behind the last."""
  inputs = {}

  def record(call, args, kwargs, context):
    if isinstance(context.module, linear.Linear) and context.method_name == '__call__':
      inputs['/'.join(context.module.path)] = args[0]
    return call(*args, **kwargs)

  with nn.intercept_methods(record):
    _apply(config, part, layer, block, x_BTD)
  sums = {}
  for matrix in matrices:
    x = inputs[matrix].astype(jnp.float32) * real_B[:, None, None]
    flat = x.reshape(-1, x.shape[-1])
    sums[matrix] = jnp.dot(flat.T, flat, precision=_EXACT)
  return sums


@functools.partial(jax.jit, static_argnums=(0, 1))
def _forward(config: layers.Config, part: str, layer, block: dict, x_BTD) -> jax.Array:
  return _apply(config, part, layer, block, x_BTD)


def _apply(config: layers.Config, part: str, layer, block: dict, x_BTD) -> jax.Array:
  """What the block's method `part` makes of x, every row a document of its own."""
  context = () if part == 'feed' else (layer, layers.in_order(x_BTD), None)
  made = (
    families.of(config).module.block(config, linear.Scheme()).apply({'frozen': block}, x_BTD, *context, method=part)
  )
  return made[0] if part == _WHOLE else made

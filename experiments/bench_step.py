"""Question: what does a step of LLaMA-7B's layers cost with QA-LoRA, beside QLoRA and LoRA on a dense base?

    python -m experiments.bench_step [--layers=N] [--width=4096] [--rows=N] [--window=N] [--rank=64] [--rounds=N]
        [--remat=none] [--time-only] [--compile-for=v5e] [--out=PATH]

Layers of the real shapes (width 4096, mlp 11008, heads of 128; --width scales all of them) with random weights under a
vocabulary of 256, so that layers are what is measured: LoRA on a dense base, QLoRA (NF4, double quantization, LoRA),
QA-LoRA at 4, 3 and 2 bits in groups of 32.  In bfloat16; on a CPU in float32, and smaller by default.  QLoRA is timed
first, alone, then each of the others beside it, in turn in every round, so that a busy machine slows both alike: read
the ratios.

    forward_ms, gradient_ms, step_ms   the loss; the loss and its gradient; a whole `step.train_step` with AdamW
    to_qlora                           the step's time over QLoRA's in the same round (paper: 21.5 h : 40.0 h = 0.54)
    utilisation                        the FLOPs that the model needs, over the step's time and the matrix peak measured
                                       in the same run: 4 P + 12 T D N for a token, with P weights in matrices (2 of the
                                       4 forward, 2 for the gradient in x: frozen weights have none of their own),
                                       T tokens in a row (causality not used), width D, N layers; adapters and what is
                                       computed again do not count
    peak_MiB                           what the compiled step holds at once (XLA's account), weights included
    layer_MiB                          what its temporaries grow by with every further layer, without and with
                                       rematerialization: what LoRA keeps of x, QA-LoRA keeps of pool(x)

`--compile-for` runs nothing: it compiles the steps for a chip that need not be there (v5e, v5p, v6e; with the extra
aot-gpu h100) at the real shapes, and reports the memory alone; `--time-only` leaves out `layer_MiB`, for which twelve
more steps are compiled.
Writes PATH.{json,md} after every method, experiments/results/bench_step-DEVICE by default.
"""

import argparse
from collections.abc import Iterator
import contextlib
import dataclasses
import functools
import pathlib
import re
import shlex
import statistics
import sys
import time

from flax import linen as nn
import jax
import jax.numpy as jnp

if not __package__:
  sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from experiments import bench_qmatmul
from qalora_jax import adapters
from qalora_jax import optim
from qalora_jax import quant
from qalora_jax import step as step_lib
from qalora_jax import topologies
from qalora_jax.kernels import product as product_lib
from qalora_jax.models import decoder
from qalora_jax.models import layers
from qalora_jax.models import linear
from qalora_jax.quant import affine
from qalora_jax.quant import float4

WIDTH, MLP, HEAD, VOCABULARY, GROUP, ALPHA, RATE = 4096, 11008, 128, 256, 32, 16.0, 1e-3
LORA, QLORA = 'LoRA, dense', 'QLoRA, NF4'
QALORA = {bits: f'QA-LoRA, {bits} bits' for bits in (4, 3, 2)}
# Whose memory is compared, at which remat, and of how many layers, for what one more of them takes.
COMPARED, REMATS = (QLORA, QALORA[4], LORA), ('none', 'full')
FEW, MANY = 2, 4


@dataclasses.dataclass(frozen=True)
class Size:
  """How large the model and the batch are; --layers and the like say otherwise."""

  layers: int
  width: int
  rows: int
  window: int
  rounds: int


SIZES = {'cpu': Size(2, 1024, 2, 256, 7), 'gpu': Size(4, WIDTH, 16, 512, 30), 'tpu': Size(2, WIDTH, 4, 512, 30)}


def schemes(rank: int, dtype) -> dict[str, linear.Scheme]:
  """What stands in the layers, by method."""
  frozen = functools.partial(linear.Scheme, frozen_dtype=dtype)
  lora, qalora = (adapters.Adapter(kind, rank, ALPHA) for kind in ('lora', 'qalora'))
  found = {
    LORA: frozen(adapter=lora),
    QLORA: frozen(quantizers=(('all', float4.Float4(64, double=True)),), adapter=lora),
  }
  for bits, name in QALORA.items():
    found[name] = frozen(quantizers=(('all', affine.Affine(bits, GROUP)),), adapter=qalora)
  return found


def config(size: Size, dtype, remat: str) -> decoder.Config:
  """LLaMA-7B's layers, scaled to a width: the mlp to whole blocks of NF4, 64 inputs."""
  mlp, heads = round(MLP * size.width / WIDTH / 64) * 64, size.width // HEAD
  return decoder.Config(
    VOCABULARY,
    size.width,
    mlp,
    size.layers,
    heads,
    heads,
    max_position_embeddings=size.window,
    dtype=dtype,
    remat=remat,
  )


def flops(config: decoder.Config, rows: int, window: int) -> int:
  """Of one step, as the module counts them."""
  layer = 4 * config.hidden_size**2 + 3 * config.hidden_size * config.intermediate_size
  weights = config.num_hidden_layers * layer + config.vocab_size * config.hidden_size
  attention = 12 * window * config.hidden_size * config.num_hidden_layers
  return rows * window * (4 * weights + attention)


def batch(rows: int, window: int, vocabulary: int) -> dict:
  """Random tokens, every one of which counts."""
  tokens = jax.random.randint(jax.random.key(1), (rows, window), 0, vocabulary)
  positions = jnp.broadcast_to(jnp.arange(window)[None], tokens.shape)
  ones = jnp.ones_like(tokens)
  return {'tokens': tokens, 'loss_mask': ones, 'segments': ones, 'positions': positions}


def optimizer():
  """AdamW as the recipes have it, at a constant rate."""
  rate = optim.schedule('constant', learning_rate=RATE, steps=1)
  return optim.adamw(rate, clip=0.3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0)


def born(model: decoder.Decoder) -> dict:
  """Random variables, {'params': ..., 'frozen': ...}."""
  return nn.unbox(model.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32)))


def step(model: decoder.Decoder):
  """(state, frozen, batch) -> (state, metrics), to be compiled with the state donated."""
  return functools.partial(step_lib.train_step, model, optimizer(), 0, 1)


def held(compiled, frozen, params) -> dict:
  """A row of what a compiled step holds."""
  memory = compiled.memory_analysis()
  megabytes = lambda count: round(count / 2**20, 3)
  return {
    'weights_MiB': megabytes(quant.stored_bytes(frozen)),
    'trained': adapters.count(params),
    'temporaries_MiB': megabytes(memory.temp_size_in_bytes),
    'peak_MiB': megabytes(
      memory.argument_size_in_bytes
      + memory.temp_size_in_bytes
      + memory.output_size_in_bytes
      - memory.alias_size_in_bytes
    ),
  }


def trainer(model: decoder.Decoder, frozen, params, tokens: dict):
  """(a function that runs one step and waits for it, the row of `held`)."""
  state = step_lib.init_state(optimizer(), params)
  compiled = jax.jit(step(model), donate_argnums=0).lower(state, frozen, tokens).compile()
  row = held(compiled, frozen, params)

  def run():
    nonlocal state
    state, metrics = compiled(state, frozen, tokens)
    jax.block_until_ready((state, metrics))

  return run, row


def abstract_step(size: Size, dtype, remat: str, scheme: linear.Scheme, compile_):
  """The compiled step and the row of `held` of a model that is never made; compile_(function, *shapes) compiles."""
  model = decoder.Decoder(config(size, dtype, remat), scheme)
  variables = jax.eval_shape(functools.partial(born, model))
  params, frozen = variables['params'], variables['frozen']
  state = jax.eval_shape(functools.partial(step_lib.init_state, optimizer()), params)
  tokens = jax.eval_shape(functools.partial(batch, size.rows, size.window, VOCABULARY))
  return held(compile_(step(model), state, frozen, tokens), frozen, params)


def memory(size: Size, dtype, rank: int, compile_) -> Iterator[dict]:
  """A row for every method and remat: what a step holds, and its temporaries for every further layer."""
  for remat in REMATS:
    for name in COMPARED:
      scheme = schemes(rank, dtype)[name]
      few, many = (
        abstract_step(dataclasses.replace(size, layers=layers), dtype, remat, scheme, compile_)
        for layers in (FEW, MANY)
      )
      grown = (many['temporaries_MiB'] - few['temporaries_MiB']) / (MANY - FEW)
      per_token = grown * 2**10 / (size.rows * size.window)
      yield {'method': name, 'remat': remat, 'layers': MANY, **many, 'layer_MiB': grown, 'layer_KiB_a_token': per_token}


def passes(model: decoder.Decoder) -> dict:
  """Jitted functions (params, frozen, batch) -> the summed loss, and -> it and its gradient in params."""

  def loss(params, frozen, tokens):
    return step_lib.score_rows(model, {'params': params, 'frozen': frozen}, tokens)[0].sum()

  # The weights are an argument: as constants of the program they would be folded, and held twice.
  return {'forward': jax.jit(loss), 'gradient': jax.jit(jax.value_and_grad(loss))}


def parts(model: decoder.Decoder, tokens: dict):
  """({part: a function that runs it once and waits}, the row of `held`) of a model with random weights."""
  variables = jax.jit(functools.partial(born, model))()
  frozen = variables['frozen']
  # The step donates its own.
  params = jax.tree.map(jnp.copy, variables['params'])
  waited = lambda f: lambda: jax.block_until_ready(f(params, frozen, tokens))
  train, row = trainer(model, frozen, variables['params'], tokens)
  return {**{part: waited(f) for part, f in passes(model).items()}, 'step': train}, row


def timed(size: Size, dtype, rank: int, remat: str, peak: float) -> Iterator[dict]:
  """A row for every method, QLoRA's first."""
  tokens = batch(size.rows, size.window, VOCABULARY)
  made = config(size, dtype, remat)
  every = schemes(rank, dtype)
  rival = None
  for name in (QLORA, *(name for name in every if name != QLORA)):
    own, row = parts(decoder.Decoder(made, every[name]), tokens)
    rival = rival or own
    seconds = {part: [] for part in own}
    ratios = []
    for _ in range(size.rounds + 1):
      for part, run in own.items():
        seconds[part].append(_seconds(run))
      ratios.append(1.0 if own is rival else seconds['step'][-1] / _seconds(rival['step']))
    warm = {part: found[1:] for part, found in seconds.items()}  # the first round compiles
    taken = statistics.median(warm['step'])
    yield {
      'method': name, **{f'{part}_ms': 1e3 * statistics.median(times) for part, times in warm.items()},
      'fastest_step_ms': 1e3 * min(warm['step']), 'to_qlora': statistics.median(ratios[1:]),
      'tokens_per_second': round(size.rows * size.window / taken),
      'utilisation': flops(made, size.rows, size.window) / taken / peak, **row,
    }  # fmt: skip


def _seconds(run) -> float:
  """That one call takes."""
  begun = time.perf_counter()
  run()
  return time.perf_counter() - begun


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog='python -m experiments.bench_step', allow_abbrev=False, epilog=__doc__.partition('\n\n')[2],
    description=__doc__.partition('\n\n')[0], formatter_class=argparse.RawDescriptionHelpFormatter,
  )  # fmt: skip
  for name in ('layers', 'width', 'rows', 'window', 'rounds'):
    parser.add_argument(f'--{name}', type=bench_qmatmul.positive, metavar='N')
  parser.add_argument('--rank', type=bench_qmatmul.positive, metavar='N', default=64)
  parser.add_argument('--remat', choices=sorted(layers.REMAT), default='none')
  parser.add_argument('--time-only', action='store_true')
  parser.add_argument(
    '--compile-for', choices=[name for name, chip in topologies.CHIPS.items() if chip.platform != 'cpu']
  )
  parser.add_argument('--out', type=pathlib.Path, metavar='PATH', help='without a suffix')
  return parser


def main(words: list[str] | None = None) -> None:
  """Measures, prints and stores."""
  parser = _parser()
  asked = parser.parse_args(words)
  device = product_lib.device()
  size = SIZES['tpu' if asked.compile_for else device.platform]
  said = {field.name: getattr(asked, field.name) for field in dataclasses.fields(Size)}
  size = dataclasses.replace(size, **{name: value for name, value in said.items() if value is not None})
  if size.width % HEAD:
    parser.error(f'argument --width: {size.width} is no multiple of {HEAD}, the width of a head')
  if asked.compile_for and asked.time_only:
    parser.error('argument --time-only: nothing is timed with --compile-for')
  dtype = jnp.float32 if device.platform == 'cpu' and not asked.compile_for else jnp.bfloat16
  more = {'size': dataclasses.asdict(size), 'rank': asked.rank, 'dtype': jnp.dtype(dtype).name}
  if asked.compile_for:
    mesh, tables = topologies.chip(asked.compile_for), {}
    compile_ = functools.partial(topologies.compiled, donate_argnums=0)
    name = f'compiled-{asked.compile_for}'
  else:
    mesh, limit = None, bench_qmatmul.limits(bench_qmatmul.SCALES[device.platform])
    tables = {'time': timed(size, dtype, asked.rank, asked.remat, limit['flops_per_second'])}
    more |= {'remat': asked.remat, **limit}
    compile_ = lambda f, *shapes: jax.jit(f, donate_argnums=0).lower(*shapes).compile()
    name = re.sub('[^a-z0-9]+', '-', device.kind.lower())
  if not asked.time_only:
    tables['memory'] = memory(size, dtype, asked.rank, compile_)
  place = asked.out or bench_qmatmul.RESULTS / f'bench_step-{name}'
  done = {}
  with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
    for table, found in tables.items():
      done[table] = []
      for row in found:
        print(row, flush=True)
        done[table].append(row)
        publish(place, done, more)
  print(place.with_name(place.name + '.md').read_text())


def publish(place: pathlib.Path, tables: dict[str, list[dict]], more: dict) -> None:
  """Writes place.json, the tables one after the other, and place.md."""
  from qalora_jax import report  # here, so that what is measured stands even where this cannot be imported

  rows = [{'table': name, **row} for name, found in tables.items() for row in found]
  content = report.document(shlex.join(['python', '-m', 'experiments.bench_step', *sys.argv[1:]]), rows, **more)
  report.write(place.with_name(place.name + '.json'), content)
  parts = [f'`{content["command"]}`, commit {content["commit"]}, {content["date"]}, {content["machine"]}; {more}\n']
  parts += [report.markdown(found) for found in tables.values()]
  place.with_name(place.name + '.md').write_text('\n'.join(parts))


if __name__ == '__main__':
  main()

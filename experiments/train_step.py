"""Question: what does one training step cost, in memory and time, for LoRA on a dense base and for QA-LoRA at 4 bits?

    python -m experiments.train_step [--model=DIR] [--peft]

One process times the steps in turn, so that a busy machine slows all alike: read the ratios, not the times.  The model
is configs/babyllama.py's checkpoint, or `--model`.  Memory is what the compiled step holds at once (XLA's own account:
arguments + temporaries + outputs that alias no argument), and the part of it that is weights.  `--peft` adds LoRA by
Hugging Face's PEFT on PyTorch, same shapes, if `pip install -e '.[parity]'` was run.
Writes experiments/results/train_step.{json,md}.
"""

import pathlib
import statistics
import sys
import time

from flax import linen as nn
import jax
import jax.numpy as jnp

from configs import babyllama
from experiments import bench_step
from qalora_jax import adapters
from qalora_jax import hf
from qalora_jax import report
from qalora_jax.models import decoder
from qalora_jax.models import linear
from qalora_jax.quant import affine
from qalora_jax.quant import float4

RESULTS = pathlib.Path(__file__).resolve().parent / 'results' / 'train_step'
ROWS, WINDOW, RANK, ALPHA, ROUNDS = 8, 256, 8, 16.0, 12
FOUR_BITS = (('all', affine.Affine(4, 32)),)
SCHEMES = {
  'LoRA, dense base': linear.Scheme(adapter=adapters.Adapter('lora', RANK, ALPHA)),
  'LoRA, 4-bit base': linear.Scheme(quantizers=FOUR_BITS, adapter=adapters.Adapter('lora', RANK, ALPHA)),
  'QA-LoRA, 4-bit base': linear.Scheme(quantizers=FOUR_BITS, adapter=adapters.Adapter('qalora', RANK, ALPHA)),
}


def jax_step(directory, scheme: linear.Scheme):
  """(a function that runs one step and waits for it, a row of what the compiled step holds)."""
  config = hf.read_config(directory)
  model = decoder.Decoder(config, scheme)
  frozen = jax.device_put(hf.load(directory, config, scheme))
  params = nn.unbox(jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32)))['params']
  tokens = bench_step.batch(ROWS, WINDOW, config.vocab_size)
  return bench_step.trainer(model, frozen, params, tokens)


def peft_step(directory):
  """As `jax_step`, for PEFT's LoRA on PyTorch; memory is not measured (PyTorch keeps no account of it on CPU)."""
  import peft  # an extra; only --peft needs it
  import torch
  import transformers

  model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
  projections = ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj']
  model = peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=projections))
  trained = [p for p in model.parameters() if p.requires_grad]
  optimizer = torch.optim.AdamW(trained, lr=bench_step.RATE, weight_decay=0.0)
  tokens = torch.randint(0, model.config.vocab_size, (ROWS, WINDOW), generator=torch.Generator().manual_seed(1))

  def run():
    optimizer.zero_grad()
    model(input_ids=tokens, labels=tokens).loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, 0.3)
    optimizer.step()

  return run, {'trained': sum(p.numel() for p in trained)}


def measure(directory, with_peft: bool) -> list[dict]:
  """One row a method; times are medians over rounds in which every method has its turn."""
  made = {name: jax_step(directory, scheme) for name, scheme in SCHEMES.items()}
  if with_peft:
    made['LoRA, dense base (PEFT on PyTorch)'] = peft_step(directory)
  seconds = {name: [] for name in made}
  for _ in range(ROUNDS + 1):
    for name, (run, _) in made.items():
      begun = time.perf_counter()
      run()
      seconds[name].append(time.perf_counter() - begun)
  first = next(iter(made))
  rows = []
  for name, (_, held) in made.items():
    warm = seconds[name][1:]
    ratios = [own / other for own, other in zip(warm, seconds[first][1:], strict=True)]
    rows.append({
      'method': name, **held, 'seconds': statistics.median(warm), 'fastest': min(warm),
      'tokens_per_second': round(ROWS * WINDOW / statistics.median(warm)),
      'time_against_first': statistics.median(ratios),
    })  # fmt: skip
  return rows


def rivals(directory) -> list[dict]:
  """The time of a step of QA-LoRA at 4 bits over one of QLoRA on NF4 with double quantization, one row a round.

  Rank, rows and window as above; both have their turn in every round, so that a busy machine slows both.
  """
  levels = (('down_proj', float4.Float4(32, double=True)), ('all', float4.Float4(64, double=True)))
  schemes = {
    'QLoRA': linear.Scheme(quantizers=levels, adapter=adapters.Adapter('lora', RANK, ALPHA)),
    'QA-LoRA': SCHEMES['QA-LoRA, 4-bit base'],
  }
  steps = {name: jax_step(directory, scheme)[0] for name, scheme in schemes.items()}
  rows = []
  for _ in range(ROUNDS + 1):
    seconds = {}
    for name, run in steps.items():
      begun = time.perf_counter()
      run()
      seconds[name] = time.perf_counter() - begun
    rows.append(seconds | {'ratio': seconds['QA-LoRA'] / seconds['QLoRA']})
  return rows[1:]  # the first round warms up


def main() -> None:
  """Measures, stores and renders."""
  words = sys.argv[1:]
  model = next((word.removeprefix('--model=') for word in words if word.startswith('--model=')), None)
  directory = pathlib.Path(model) if model else babyllama.ASSETS / 'models' / 'babyllama_tok105'
  rows = measure(directory, '--peft' in words)
  settings = {'model': directory.name, 'rows_per_step': ROWS, 'window': WINDOW, 'rank': RANK, 'rounds': ROUNDS}
  report.publish(RESULTS, 'one training step', 'python -m experiments.train_step ' + ' '.join(words), rows, **settings)


if __name__ == '__main__':
  main()

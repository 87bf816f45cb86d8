"""Question: what does a generated token cost, by bits and by length of the text before it, and beside llama.cpp?

    python -m experiments.decode [--llama]

A LLaMA of 25 million random weights (a token's cost does not depend on them) and a window of 4,096 tokens, dense and
quantized in 8, 4, 3 and 2 bits by groups of 32.  One process writes 16 tokens of each in turn, so that a busy machine
slows all alike: read the ratios, not the times.  `first_ms` and `last_ms` are the medians of the first and the last
quarter of the tokens written after a prompt: equal, if a token costs the same wherever in the text it stands.
`--llama` adds llama.cpp on the exported 4-bit model, on as many threads, if `pip install -e '.[clients]'` was run.
Writes experiments/results/decode.{json,md}.
"""

import os
import pathlib
import statistics
import sys
import tempfile
import time

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from configs import babyllama
from qalora_jax import build
from qalora_jax import quant
from qalora_jax import report
from qalora_jax import tokenizer
from qalora_jax.export import command as export
from qalora_jax.generate import decode
from qalora_jax.models import decoder
from qalora_jax.models import linear
from qalora_jax.quant import affine

RESULTS = pathlib.Path(__file__).resolve().parent / 'results' / 'decode'
CONFIG = decoder.Config(512, 512, 1408, 8, 8, 8, max_position_embeddings=4096, tie_word_embeddings=True)
CONTEXTS, TOKENS, BLOCK = (64, 512, 1984, 3904), 96, 16
BITS = (32, 8, 4, 3, 2)


def models() -> dict[int, tuple[decoder.Decoder, dict]]:
  """{bits: (model, variables)} of one set of random weights; 32 is dense."""
  made = {}
  for bits in BITS:
    quantizers = () if bits == 32 else (('all', affine.Affine(bits, 32)),)
    model = decoder.Decoder(CONFIG, linear.Scheme(quantizers=quantizers))
    made[bits] = model, nn.unbox(jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32)))
  return made


def prompt(length: int) -> list[int]:
  """Random tokens that no tokenizer means anything by."""
  return np.random.default_rng(length).integers(260, CONFIG.vocab_size, length).tolist()


def ours(model, variables, length: int):
  """Yields once a token: what `qalora generate` does."""
  yield from decode.stream(model, variables, [prompt(length)], max_tokens=TOKENS, key=jax.random.key(0))


def theirs(file: pathlib.Path, length: int):
  """Yields once a token: llama.cpp, greedily."""
  import llama_cpp  # an extra; only --llama needs it

  threads = len(os.sched_getaffinity(0))
  program = llama_cpp.Llama(str(file), n_ctx=4096, n_threads=threads, n_threads_batch=threads, verbose=False)
  program.eval(prompt(length))
  for _ in range(TOKENS):
    token = program.sample(temp=0.0)
    yield token
    program.eval([token])


def exported(place: pathlib.Path, model, variables) -> pathlib.Path:
  """The 4-bit model as a GGUF file, with the tokenizer of a real one of as many tokens."""
  directory = babyllama.ASSETS / 'models' / 'stories260K'
  own = tokenizer.load(directory)
  loaded = build.Loaded(model, {'params': {}, **variables}, own, directory, {'source': 'random'})
  export.export(loaded, None, place / 'gguf', format='gguf')
  return place / 'gguf' / export.gguf.FILE


def measure(with_llama: bool) -> list[dict]:
  """One row an implementation, width and context; the tokens of all are written in turn."""
  made, rows = models(), []
  with tempfile.TemporaryDirectory() as place:
    file = exported(pathlib.Path(place), *made[4]) if with_llama else None
    for length in CONTEXTS:
      streams = {('qalora_jax', bits): ours(model, variables, length) for bits, (model, variables) in made.items()}
      if file:
        streams['llama.cpp', 4] = theirs(file, length)
      seconds = {name: [] for name in streams}
      for stream in streams.values():
        for _ in range(BLOCK):  # the prompt, the compilations
          next(stream)
      for _ in range(TOKENS // BLOCK - 1):
        for name, stream in streams.items():
          next(stream)  # may wait for what another stream began
          for _ in range(BLOCK - 1):
            begun = time.perf_counter()
            next(stream)
            seconds[name].append(time.perf_counter() - begun)
      for (program, bits), found in seconds.items():
        quarter = len(found) // 4
        median = statistics.median(found)
        rows.append({
          'program': program, 'bits': bits, 'context': length, 'tokens_per_second': round(1 / median, 1),
          'first_ms': round(1e3 * statistics.median(found[:quarter]), 2),
          'last_ms': round(1e3 * statistics.median(found[-quarter:]), 2),
          'time_against_dense': median / statistics.median(seconds['qalora_jax', 32]),
          'weights_MiB': round(quant.stored_bytes(made[bits][1]) / 2**20, 2),
        })  # fmt: skip
  return rows


def main() -> None:
  """Measures, stores and renders."""
  words = sys.argv[1:]
  rows = measure('--llama' in words)
  settings = {'weights': f'{CONFIG.num_hidden_layers} layers of {CONFIG.hidden_size}', 'tokens': TOKENS}
  report.publish(RESULTS, 'one generated token', ' '.join(['python -m experiments.decode', *words]), rows, **settings)


if __name__ == '__main__':
  main()

"""`qalora generate`: text from a prompt."""

import functools
import sys

from flax import linen as nn
import jax
import jax.numpy as jnp

from qalora_jax import build
from qalora_jax import cli
from qalora_jax import config as config_lib

SUMMARY = (
  'Continues --prompt with the model: --model, else the run in --workdir, else config.model.source.\n'
  'config.generate holds length, temperature, top_k and top_p; config.seed the draws.'
)
# Buffers grow in steps of this many tokens, so that prompts of many lengths share few compiled programs.
_STEP = 64


def main(argv=None) -> str:
  """Runs the command with `argv`; prints the text as it comes and returns it."""
  flags = (
    config_lib.Flag('model', 'string', '', 'A workdir, Hugging Face directory, exported directory or hub id.'),
    config_lib.Flag('prompt', 'string', '', 'The text to continue.'),
  )
  arguments = config_lib.parse('generate', argv, summary=SUMMARY, extra_flags=flags)
  config, prompt = arguments.config, arguments.values['prompt']
  loaded = build.open_model(config, arguments.workdir, arguments.values['model'])
  tokenizer = loaded.tokenizer
  bos = [] if tokenizer.bos is None else [tokenizer.bos]
  tokens = bos + tokenizer.encode(prompt)
  if not tokens:
    raise ValueError('this tokenizer has no BOS to start from: give a --prompt.')
  settings = config.generate
  written, shown, given = [], '', len(tokenizer.decode(tokens))
  drawn = stream(
    loaded.model,
    loaded.variables,
    tokens,
    max_tokens=settings.max_tokens,
    key=jax.random.key(config.seed),
    temperature=settings.temperature,
    top_k=settings.top_k,
    top_p=settings.top_p,
  )
  print(prompt, end='', flush=True)
  for token in drawn:
    if token == tokenizer.eos:
      break
    written.append(token)
    # Decoded with the prompt: the spelling of a token can depend on those before it.
    text = tokenizer.decode(tokens + written)[given:]
    if not text.endswith('\ufffd'):
      print(text[len(shown) :], end='', flush=True)
      shown = text
  print()
  return shown


def stream(
  model: nn.Module,
  variables: dict,
  tokens: list[int],
  *,
  max_tokens: int,
  key,
  temperature: float = 0.0,
  top_k: int = 0,
  top_p: float = 1.0,
):
  """Yields up to `max_tokens` token ids that continue `tokens`; stops at the model's window.

  Each token is one forward pass over a buffer of fixed length, so the program is compiled once.  Raises ValueError
  where the prompt already fills the window.
  """
  window = model.config.max_position_embeddings
  if len(tokens) >= window:
    raise ValueError(f'the prompt has {len(tokens)} tokens and the model a window of {window}; shorten the prompt.')
  size = min(window, -(-(len(tokens) + max_tokens) // _STEP) * _STEP)
  buffer = jnp.zeros((1, size), jnp.int32).at[0, : len(tokens)].set(jnp.asarray(tokens, jnp.int32))
  draw = jax.jit(functools.partial(_next, model, temperature, top_k, top_p))
  for length in range(len(tokens), min(size, len(tokens) + max_tokens)):
    buffer, token = draw(variables, buffer, length, jax.random.fold_in(key, length))
    yield int(token)


def sample(logits_V, key, *, temperature: float, top_k: int, top_p: float) -> jax.Array:
  """One token id: the likeliest at temperature 0, else drawn from softmax(logits / temperature) after the cuts.

  top_k keeps the k likeliest (0: all); top_p the smallest set of likeliest tokens whose probability reaches top_p
  (nucleus sampling; Holtzman et al., 2020).
  """
  if temperature == 0.0:
    return jnp.argmax(logits_V)
  logits_V = logits_V / temperature
  ordered = jnp.sort(logits_V, descending=True)
  if top_k:
    kth = ordered[min(top_k, logits_V.size) - 1]
    logits_V, ordered = (jnp.where(x >= kth, x, -jnp.inf) for x in (logits_V, ordered))
  p = jax.nn.softmax(ordered)
  before = jnp.cumsum(p) - p
  least = jnp.min(jnp.where(before < top_p, ordered, jnp.inf))
  return jax.random.categorical(key, jnp.where(logits_V >= least, logits_V, -jnp.inf))


def _next(model, temperature, top_k, top_p, variables, buffer, length, key):
  logits = model.apply(variables, buffer)[0, length - 1]
  token = sample(logits, key, temperature=temperature, top_k=top_k, top_p=top_p)
  return buffer.at[0, length].set(token.astype(buffer.dtype)), token


if __name__ == '__main__':
  cli.run(main, 'generate', sys.argv[1:])

"""Trained matrices with the inputs that they see: layer 1 of a small LLaMA, reading real stories."""

import functools
import json

import numpy as np
import numpy_llama
from safetensors import numpy as safetensors_numpy

from qalora_jax import tokenizer

CHARACTERS, WINDOW = 6_144, 256


@functools.cache
def layer(assets):
  """{'q_proj': (w [128, 128], x [N, 128]), 'down_proj': (w [352, 128], x [N, 352])} in float32, N tokens."""
  directory = assets / 'models' / 'babyllama_tok105'
  config = json.loads((directory / 'config.json').read_text())
  weights = safetensors_numpy.load_file(directory / 'model.safetensors')
  with open(assets / 'tinystories' / 'tinystories_sample.txt', encoding='utf-8') as file:
    ids = np.array(tokenizer.load(directory).encode(file.read(CHARACTERS)))
  x = weights['model.embed_tokens.weight'][ids[: len(ids) // WINDOW * WINDOW].reshape(-1, WINDOW)]
  for n in range(2):
    own = {name.removeprefix(f'model.layers.{n}.'): w for name, w in weights.items() if f'.layers.{n}.' in name}
    narrow = numpy_llama.norm(config, x, own['input_layernorm.weight'])
    x = x + numpy_llama.attention(config, own, narrow)
    h = numpy_llama.norm(config, x, own['post_attention_layernorm.weight'])
    gate, up = (h @ own[f'mlp.{name}_proj.weight'].T for name in ('gate', 'up'))
    wide = gate / (1 + np.exp(-gate)) * up
    x = x + wide @ own['mlp.down_proj.weight'].T
  seen = {'self_attn.q_proj': narrow, 'mlp.down_proj': wide}
  return {
    name.partition('.')[2]: (own[f'{name}.weight'].T, inputs.reshape(-1, inputs.shape[-1]))
    for name, inputs in seen.items()
  }


def hessian(x):
  """The mean of x x^T over tokens x [N, I], in float32."""
  return (x.T @ x / len(x)).astype(np.float32)

"""LLaMA in plain numpy, from a Hugging Face directory: the "elsewhere" that exported directories must load in.

Shares no code with the package, nor its way of writing the formulas; slow, and meant to be read.
"""

import json
import pathlib

import ml_dtypes  # noqa: F401 - tells numpy what bfloat16 is
import numpy as np
from safetensors import numpy as safetensors_numpy


def logits(directory, tokens_BT, dtype=np.float64):
  """tokens [B, T] -> logits [B, T, V], every operation in `dtype`."""
  config = json.loads((pathlib.Path(directory) / 'config.json').read_text())
  weights = {}
  for file in pathlib.Path(directory).glob('*.safetensors'):
    weights |= {name: w.astype(dtype) for name, w in safetensors_numpy.load_file(file).items()}
  x = weights['model.embed_tokens.weight'][np.asarray(tokens_BT)]
  for n in range(config['num_hidden_layers']):
    layer = {name.removeprefix(f'model.layers.{n}.'): w for name, w in weights.items() if f'.layers.{n}.' in name}
    x = x + attention(config, layer, norm(config, x, layer['input_layernorm.weight']))
    h = norm(config, x, layer['post_attention_layernorm.weight'])
    gate, up = h @ layer['mlp.gate_proj.weight'].T, h @ layer['mlp.up_proj.weight'].T
    x = x + (gate / (1 + np.exp(-gate)) * up) @ layer['mlp.down_proj.weight'].T
  head = 'model.embed_tokens.weight' if config['tie_word_embeddings'] else 'lm_head.weight'
  return norm(config, x, weights['model.norm.weight']) @ weights[head].T


def norm(config, x, scale):
  return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + x.dtype.type(config['rms_norm_eps'])) * scale


def attention(config, layer, x_BTD):
  B, T, D = x_BTD.shape
  heads, shared = config['num_attention_heads'], config['num_key_value_heads']
  width = config.get('head_dim') or D // heads
  q, k, v = (x_BTD @ layer[f'self_attn.{name}_proj.weight'].T for name in 'qkv')
  cos, sin = rotations(config, T, width, x_BTD.dtype)
  y_BTHC = np.zeros((B, T, heads, width), x_BTD.dtype)
  for h in range(heads):
    of = slice(h * width, (h + 1) * width)
    of_shared = slice(h * shared // heads * width, (h * shared // heads + 1) * width)
    query, key = (turn(a, cos, sin) for a in (q[..., of], k[..., of_shared]))
    scores = query @ key.transpose(0, 2, 1) / x_BTD.dtype.type(width**0.5)
    scores[:, np.triu(np.ones((T, T), bool), 1)] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    y_BTHC[:, :, h] = weights / weights.sum(-1, keepdims=True) @ v[..., of_shared]
  return y_BTHC.reshape(B, T, heads * width) @ layer['self_attn.o_proj.weight'].T


def turn(x_BTC, cos, sin):
  """Hugging Face's rotary embedding: x cos + rotate_half(x) sin."""
  half = x_BTC.shape[-1] // 2
  return x_BTC * cos + np.concatenate([-x_BTC[..., half:], x_BTC[..., :half]], -1) * sin


def rotations(config, T, width, dtype):
  """Cosines and sines [T, width], as transformers computes them, LLaMA-3's scaling included."""
  frequency = config['rope_theta'] ** (-np.arange(0, width, 2) / width)
  scaling = config.get('rope_scaling')
  if scaling:
    assert scaling['rope_type'] == 'llama3'
    factor, low, high = (scaling[name] for name in ('factor', 'low_freq_factor', 'high_freq_factor'))
    original, wavelength = scaling['original_max_position_embeddings'], 2 * np.pi / frequency
    smooth = (original / wavelength - low) / (high - low)
    middle = (1 - smooth) * frequency / factor + smooth * frequency
    middle = np.where(wavelength > original / low, frequency / factor, middle)
    frequency = np.where(wavelength < original / high, frequency, middle)
  angles = np.arange(T, dtype=dtype)[:, None] * frequency.astype(dtype)
  return np.cos(np.concatenate([angles, angles], -1)), np.sin(np.concatenate([angles, angles], -1))

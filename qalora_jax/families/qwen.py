"""Qwen 2, 2.5 and 3 as Hugging Face keeps them.

Beside LLaMA, Qwen 2 has biases of queries, keys and values, Qwen 3 norms of each head's queries and keys.  Either may
let tokens of its last layers, from max_window_layers on, see no more than a window.
"""

from collections.abc import Mapping

from qalora_jax.families import family
from qalora_jax.families import llama
from qalora_jax.models import decoder

_REQUIRED = ('num_key_value_heads', 'max_position_embeddings')
_FIXED = {'mlp_bias': False, 'use_mrope': False}


def _windows(raw: Mapping) -> dict:
  """The fields of decoder.Config for what config.json says of windows; absent, keys mean what transformers says."""
  depth, window = raw['num_hidden_layers'], family.window(raw, 4096) if raw.get('use_sliding_window') else 0
  first = family.count(raw, 'max_window_layers', 28, least=0)
  by_number = [decoder.SLIDING if window and layer >= first else decoder.FULL for layer in range(depth)]
  return dict(window=window, kinds=tuple(raw.get('layer_types') or by_number))


def _stated_windows(config: decoder.Config) -> dict:
  return {
    'use_sliding_window': bool(config.window),
    'sliding_window': config.window or None,
    'max_window_layers': next(
      (at for at, kind in enumerate(config.seen) if kind == decoder.SLIDING), config.num_hidden_layers
    ),
    'layer_types': list(config.seen),
  }


def read_2(raw: Mapping, **placed) -> decoder.Config:
  """The config of a Qwen 2's config.json; `placed`: dtype, remat."""
  family.check_fixed(raw, _FIXED | {'attention_bias': True})
  said = llama.shape(raw, required=_REQUIRED) | dict(biased=decoder.QUERY_KEY_VALUE)
  return decoder.Config(**said, **llama.turned(raw), **_windows(raw), family='qwen2', **placed)


def write_2(config: decoder.Config) -> dict:
  """What config.json says of a Qwen 2."""
  said = llama.stated(config) | llama.stated_turning(config) | _stated_windows(config)
  del said['attention_bias']
  return said


def read_3(raw: Mapping, **placed) -> decoder.Config:
  """The config of a Qwen 3's config.json; `placed`: dtype, remat."""
  family.check_fixed(raw, _FIXED)
  said = llama.shape(raw, required=_REQUIRED, head_dim=128)
  return decoder.Config(**said, **llama.turned(raw), **_windows(raw), head_norms=True, family='qwen3', **placed)


def write_3(config: decoder.Config) -> dict:
  """What config.json says of a Qwen 3."""
  return llama.stated(config) | llama.stated_turning(config) | _stated_windows(config)


QWEN2 = family.Family(
  model_type='qwen2',
  architecture='Qwen2ForCausalLM',
  module=decoder.Decoder,
  read=read_2,
  write=write_2,
  names=llama.names,
  ignored=llama.ignored,
  copies=llama.copies,
  spelled=llama.spelled,
)
QWEN3 = family.Family(
  model_type='qwen3',
  architecture='Qwen3ForCausalLM',
  module=decoder.Decoder,
  read=read_3,
  write=write_3,
  names=llama.names,
  ignored=llama.ignored,
  copies=llama.copies,
  spelled=llama.spelled,
)

"""Mistral as Hugging Face keeps it: a LLaMA whose tokens may see no more than a window."""

from collections.abc import Mapping

from qalora_jax.families import family
from qalora_jax.families import llama
from qalora_jax.models import decoder

_REQUIRED = ('num_key_value_heads', 'max_position_embeddings')
_FIXED = {'attention_bias': False, 'mlp_bias': False}


def read(raw: Mapping, **placed) -> decoder.Config:
  """The config of a Mistral's config.json; `placed`: dtype, remat."""
  family.check_fixed(raw, _FIXED)
  window = family.window(raw, 4096)
  # transformers' Mistral does not look at layer_types, which are Ministral's, with layers of both kinds.
  kind = decoder.SLIDING if window else decoder.FULL
  if other := set(raw.get('layer_types') or ()) - {kind}:
    raise ValueError(f'layer_types has {sorted(other)[0]!r}; with this sliding_window every layer is {kind!r}.')
  return decoder.Config(
    **llama.shape(raw, required=_REQUIRED), **llama.turned(raw), window=window, family='mistral', **placed
  )


def write(config: decoder.Config) -> dict:
  """What config.json says of a Mistral."""
  said = llama.stated(config) | llama.stated_turning(config) | {'sliding_window': config.window or None}
  del said['attention_bias']
  return said


MISTRAL = family.Family(
  model_type='mistral',
  architecture='MistralForCausalLM',
  module=decoder.Decoder,
  read=read,
  write=write,
  names=llama.names,
  ignored=llama.ignored,
  copies=llama.copies,
  spelled=llama.spelled,
)

"""LLaMA 1, 2 and 3 as Hugging Face keeps them, and what its relatives share with them.

config.json may say what a model does in training alone (dropout, initializer_range); that is not looked at.
"""

from collections.abc import Iterable
from collections.abc import Mapping
import re

from qalora_jax.families import family
from qalora_jax.families import rope
from qalora_jax.models import decoder

SIZES = ('vocab_size', 'hidden_size', 'intermediate_size', 'num_hidden_layers', 'num_attention_heads')
# Absent or null, these mean the default of decoder.Config, which is LLaMA's in transformers.
_OPTIONAL = ('max_position_embeddings', 'rms_norm_eps', 'tie_word_embeddings', 'head_dim')

# Counts among what may be absent.
_COUNTS = ('num_key_value_heads', 'max_position_embeddings', 'head_dim')

_OUTER = {
  'embedding': 'model.embed_tokens.weight',
  'norm/scale': 'model.norm.weight',
  'lm_head/kernel': 'lm_head.weight',
}
_BARE = re.compile(r'(embed_tokens|layers|norm)\.')
_NORMS = {'attention_norm': 'input_layernorm', 'mlp_norm': 'post_attention_layernorm'}
_NORMS_TWICE = {
  'attention_norm': 'input_layernorm',
  'attention_post_norm': 'post_attention_layernorm',
  'mlp_norm': 'pre_feedforward_layernorm',
  'mlp_post_norm': 'post_feedforward_layernorm',
}


def shape(raw: Mapping, *, required: Iterable[str] = (), activation: str = 'hidden_act', **defaults) -> dict:
  """The fields of decoder.Config that config.json states for LLaMA and relatives alike: sizes, norms' epsilon, biases.

  `required`: counts that it has to state beside SIZES.  `activation`: the key of the activation's name.  `defaults`:
  what keys mean that are absent or null, where that is not what LLaMA's mean.
  """
  # Not said or true, as in all that was published: transformers lets tokens see those behind them where it is not.
  family.check_fixed(raw, {'is_causal': True})
  also = [key for key in _COUNTS if raw.get(key) is not None]
  family.check_counts(raw, (*SIZES, *required, *also))
  # Before LLaMA 2 the file did not say it: every head had its own keys and values.
  heads = raw.get('num_key_value_heads') or raw['num_attention_heads']
  said = defaults | family.stated(raw, (*SIZES, *_OPTIONAL, activation))
  said['rms_norm_eps'] = family.number(said, 'rms_norm_eps', decoder.Config.rms_norm_eps)
  name = said.pop(activation, 'silu')
  family.check_choice(activation, name, decoder.ACTIVATIONS)
  biased = decoder.ATTENTION if raw.get('attention_bias') else ()
  return said | dict(num_key_value_heads=heads, activation=name, biased=biased)


def stated(config: decoder.Config, activation: str = 'hidden_act') -> dict:
  """What config.json says of what `shape` reads."""
  said = {key: getattr(config, key) for key in (*SIZES, *_OPTIONAL, 'num_key_value_heads')}
  return said | {activation: config.activation, 'attention_bias': set(decoder.ATTENTION) <= set(config.biased)}


def turned(raw: Mapping) -> dict:
  """The fields of decoder.Config that config.json states of rotary positions, one for all layers."""
  theta, scaling = rope.read(raw)
  return dict(rope_theta=theta, rope_scaling=scaling)


def stated_turning(config: decoder.Config) -> dict:
  """What config.json says of what `turned` reads."""
  return {'rope_theta': config.rope_theta, 'rope_scaling': rope.said(config.rope_scaling)}


def read(raw: Mapping, **placed) -> decoder.Config:
  """The config of a LLaMA's config.json; `placed`: dtype, remat."""
  said = shape(raw)
  if raw.get('mlp_bias'):
    said['biased'] += (*decoder.MLP_IN, 'mlp/down_proj')
  return decoder.Config(**said, **turned(raw), **placed)


def write(config: decoder.Config) -> dict:
  """What config.json says of a LLaMA."""
  return stated(config) | stated_turning(config) | {'mlp_bias': 'mlp/down_proj' in config.biased}


def names(config: decoder.Config) -> dict[str, str]:
  """{path: name} of a LLaMA or a relative; what it has follows from its config."""
  table = {path: name for path, name in _OUTER.items() if not (config.tie_word_embeddings and path == 'lm_head/kernel')}
  within = {f'{path}/scale': f'{name}.weight' for path, name in (_NORMS_TWICE if config.post_norms else _NORMS).items()}
  if config.head_norms:
    within |= {f'attention/{name}/scale': f'self_attn.{name}.weight' for name in ('q_norm', 'k_norm')}
  for method in config.sequence['layers'].values():
    for matrix in (matrix for alike in method for matrix in alike):
      name = matrix.replace('attention/', 'self_attn.').replace('mlp/', 'mlp.')
      within[f'{matrix}/kernel'] = f'{name}.weight'
      if matrix in config.biased:
        within[f'{matrix}/bias'] = f'{name}.bias'
  return table | {f'layers/{path}': f'model.layers.{{}}.{name}' for path, name in within.items()}


def ignored(config: decoder.Config, name: str) -> bool:
  """Old checkpoints' rotary frequencies, and the second copy of a tied head."""
  return name.endswith('.rotary_emb.inv_freq') or name in copies(config)


def copies(config: decoder.Config) -> dict[str, str]:
  """The head of a model that says it is tied."""
  return {_OUTER['lm_head/kernel']: _OUTER['embedding']} if config.tie_word_embeddings else {}


def spelled(name: str) -> str:
  """The name in a model with a head of one in a model without."""
  return f'model.{name}' if _BARE.match(name) else name


LLAMA = family.Family(
  model_type='llama',
  architecture='LlamaForCausalLM',
  module=decoder.Decoder,
  read=read,
  write=write,
  names=names,
  ignored=ignored,
  copies=copies,
  spelled=spelled,
)

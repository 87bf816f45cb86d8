"""GPT-2 as Hugging Face keeps it: matrices as [inputs, outputs], queries, keys and values in one tensor."""

from collections.abc import Mapping
import re

from qalora_jax.families import family
from qalora_jax.models import decoder

# What config.json calls the fields of decoder.Config.
_COUNTS = {
  'vocab_size': 'vocab_size',
  'n_embd': 'hidden_size',
  'n_layer': 'num_hidden_layers',
  'n_head': 'num_attention_heads',
  'n_positions': 'max_position_embeddings',
}
# reorder_and_upcast_attn says how precisely scores are added up, which here is always in float32.
_FIXED = {'scale_attn_by_inverse_layer_idx': False, 'add_cross_attention': False, 'is_causal': True}

_OUTER = {
  'embedding': 'transformer.wte.weight',
  'positions': 'transformer.wpe.weight',
  'norm/scale': 'transformer.ln_f.weight',
  'norm/bias': 'transformer.ln_f.bias',
  'lm_head/kernel': 'lm_head.weight',
}
_LAYER = {
  'attention_norm/scale': 'ln_1.weight',
  'attention_norm/bias': 'ln_1.bias',
  'mlp_norm/scale': 'ln_2.weight',
  'mlp_norm/bias': 'ln_2.bias',
}
# q_proj, k_proj and v_proj stand for parts of c_attn, which files hold.
_MATRICES = {
  'attention/q_proj': 'attn.q_proj',
  'attention/k_proj': 'attn.k_proj',
  'attention/v_proj': 'attn.v_proj',
  'attention/o_proj': 'attn.c_proj',
  'mlp/up_proj': 'mlp.c_fc',
  'mlp/down_proj': 'mlp.c_proj',
}


def read(raw: Mapping, **placed) -> decoder.Config:
  """The config of a GPT-2's config.json; `placed`: dtype, remat."""
  family.check_counts(raw, _COUNTS)
  family.check_fixed(raw, _FIXED)
  activation = raw.get('activation_function', 'gelu_new')
  family.check_choice('activation_function', activation, decoder.ACTIVATIONS)
  said = {field: raw[key] for key, field in _COUNTS.items()}
  if said['hidden_size'] % said['num_attention_heads']:
    raise ValueError(f'n_embd = {raw["n_embd"]} is no multiple of n_head = {raw["n_head"]}.')
  if raw.get('n_inner') is not None:
    family.check_counts(raw, ('n_inner',))
  return decoder.Config(
    **said,
    intermediate_size=raw.get('n_inner') or 4 * said['hidden_size'],
    num_key_value_heads=said['num_attention_heads'],
    rope_theta=0.0,
    rms_norm_eps=family.number(raw, 'layer_norm_epsilon', 1e-5),
    tie_word_embeddings=family.value(raw, 'tie_word_embeddings', True),
    activation=activation,
    gated=False,
    norm='layer',
    biased=tuple(_MATRICES),
    attention_scale=0.0 if raw.get('scale_attn_weights', True) else 1.0,
    learned_positions=True,
    family='gpt2',
    **placed,
  )


def write(config: decoder.Config) -> dict:
  """What config.json says of a GPT-2."""
  return {key: getattr(config, field) for key, field in _COUNTS.items()} | {
    'n_inner': config.intermediate_size,
    'activation_function': config.activation,
    'layer_norm_epsilon': config.rms_norm_eps,
    'tie_word_embeddings': config.tie_word_embeddings,
    'scale_attn_weights': not config.attention_scale,
  }


def names(config: decoder.Config) -> dict[str, str]:
  """{path: name}."""
  table = {path: name for path, name in _OUTER.items() if not (config.tie_word_embeddings and path == 'lm_head/kernel')}
  within = dict(_LAYER)
  for matrix, name in _MATRICES.items():
    within |= {f'{matrix}/kernel': f'{name}.weight', f'{matrix}/bias': f'{name}.bias'}
  return table | {f'layers/{path}': f'transformer.h.{{}}.{name}' for path, name in within.items()}


def views(config: decoder.Config) -> dict[str, family.View]:
  """{name: View} of every projection: Conv1D holds matrices the other way round, and c_attn three of them."""
  width, wide = config.hidden_size, config.intermediate_size
  stored = {
    'attn.c_attn': {f'attn.{name}': width for name in ('q_proj', 'k_proj', 'v_proj')},
    'attn.c_proj': {'attn.c_proj': width},
    'mlp.c_fc': {'mlp.c_fc': wide},
    'mlp.c_proj': {'mlp.c_proj': width},
  }
  found = {}
  for kind, outputs_first in (('weight', False), ('bias', True)):
    name = f'transformer.h.{{{{}}}}.{{}}.{kind}'.format
    for whole, parts in stored.items():
      found |= {name(part): view for part, view in family.fused(name(whole), parts, outputs_first)}
  return found


def ignored(config: decoder.Config, name: str) -> bool:
  """Old checkpoints' causal masks, and the second copy of a tied head."""
  is_mask = re.search(r'\.attn\.(masked_)?bias$', name) is not None
  return is_mask or name in copies(config)


def copies(config: decoder.Config) -> dict[str, str]:
  """The head of a model that says it is tied."""
  return {_OUTER['lm_head/kernel']: _OUTER['embedding']} if config.tie_word_embeddings else {}


def spelled(name: str) -> str:
  """The name as GPT2LMHeadModel saves it of one that GPT2Model saved, as the published checkpoints are."""
  return f'transformer.{name}' if re.match(r'(wte|wpe|ln_f|h)\.', name) else name


GPT2 = family.Family(
  model_type='gpt2',
  architecture='GPT2LMHeadModel',
  module=decoder.Decoder,
  read=read,
  write=write,
  names=names,
  views=views,
  ignored=ignored,
  copies=copies,
  spelled=spelled,
)

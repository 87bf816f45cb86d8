"""Gemma 2 and the text model of Gemma 3, alone or beside its vision tower, as Hugging Face keeps them.

Beside LLaMA both have scales that are stored as their distance from 1, norms behind attention and mlp, embeddings times
D^(1/2), a scale of scores of their own, GELU, and layers that see a window between those that see everything.  Gemma 2
caps scores and logits; Gemma 3 has norms of each head's queries and keys, and layers of a window turn by a theta of
their own.
"""

from collections.abc import Mapping
import dataclasses
import re

from qalora_jax.families import family
from qalora_jax.families import llama
from qalora_jax.families import rope
from qalora_jax.models import decoder

_ACTIVATION = 'hidden_activation'
_REQUIRED = ('num_key_value_heads', 'max_position_embeddings', 'head_dim')
_DEFAULTS = {'tie_word_embeddings': True, _ACTIVATION: 'gelu_pytorch_tanh'}
# None means no: transformers 5 writes it so.
_BOTH_WAYS = 'use_bidirectional_attention'
# What a text_config beside a vision tower leaves to transformers.
_TEXT = dict(
  vocab_size=262208,
  hidden_size=2304,
  intermediate_size=9216,
  num_hidden_layers=26,
  num_attention_heads=8,
  num_key_value_heads=4,
  head_dim=256,
  max_position_embeddings=131072,
)
_TOWER = re.compile(r'(model\.)?(vision_tower|multi_modal_projector)\.')
# Gemma 3's bases of rotary positions where nothing is said, of all places and of a window.
_THETA, _LOCAL_THETA = 1e6, 1e4


def _read(raw: Mapping, pattern: int) -> dict:
  """What both say alike; where layer_types are not said, every layer whose number from 1 `pattern` divides sees all."""
  if raw.get(_BOTH_WAYS):
    raise ValueError(f'{_BOTH_WAYS} = {raw[_BOTH_WAYS]!r}; only False is supported.')
  said = llama.shape(raw, required=_REQUIRED, activation=_ACTIVATION, **_DEFAULTS)
  # transformers does not look at hidden_act, which older files say too.
  family.check_fixed(raw, {'hidden_act': said['activation'], 'mlp_bias': False})
  numbers = range(1, said['num_hidden_layers'] + 1)
  kinds = raw.get('layer_types') or [decoder.SLIDING if number % pattern else decoder.FULL for number in numbers]
  return said | dict(
    norm_shift=1.0,
    post_norms=True,
    kinds=tuple(kinds),
    window=family.window(raw, 4096),
    attention_scale=family.number(raw, 'query_pre_attn_scalar', 256) ** -0.5,
    embedding_scale=float(said['hidden_size']) ** 0.5,
  )


def _write(config: decoder.Config) -> dict:
  """What config.json says of what `_read` reads."""
  return llama.stated(config, _ACTIVATION) | {
    'layer_types': list(config.seen),
    'sliding_window': config.window or None,
    'query_pre_attn_scalar': _scalar(config),
    'final_logit_softcapping': config.logit_cap or None,
    'attn_logit_softcapping': config.attention_cap or None,
  }


def _scalar(config: decoder.Config) -> int | float:
  """attention_scale^-2, a whole number where that gives the same scale, as transformers wants it."""
  exact = config.attention_scale**-2
  return round(exact) if float(round(exact)) ** -0.5 == config.attention_scale else exact


def read_2(raw: Mapping, **placed) -> decoder.Config:
  """The config of a Gemma 2's config.json; `placed`: dtype, remat."""
  return decoder.Config(
    **_read(raw, pattern=2),
    **llama.turned(raw),
    attention_cap=raw.get('attn_logit_softcapping', 50.0) or 0.0,
    logit_cap=raw.get('final_logit_softcapping', 30.0) or 0.0,
    family='gemma2',
    **placed,
  )


def write_2(config: decoder.Config) -> dict:
  """What config.json says of a Gemma 2."""
  return _write(config) | llama.stated_turning(config)


def read_3(raw: Mapping, **placed) -> decoder.Config:
  """The config of a Gemma 3's text config.json; `placed`: dtype, remat."""
  # transformers has the key, and does not look at it.
  family.check_fixed(raw, {'attn_logit_softcapping': None})
  pattern = family.count(raw, 'sliding_window_pattern', family.count(raw, '_sliding_window_pattern', 6))
  (theta, scaling), (local_theta, local_scaling) = rope.read_by_kind(raw, _THETA, _LOCAL_THETA)
  return decoder.Config(
    **_read(raw, pattern),
    head_norms=True,
    rope_theta=theta,
    rope_scaling=scaling,
    local_theta=local_theta,
    local_scaling=local_scaling,
    logit_cap=raw.get('final_logit_softcapping') or 0.0,
    family='gemma3_text',
    **placed,
  )


def read_beside_vision(raw: Mapping, **placed) -> decoder.Config:
  """The config of the text model in the config.json of a Gemma 3 that sees images too; `placed`: dtype, remat."""
  text = raw.get('text_config')
  if not isinstance(text, Mapping):
    raise ValueError('has no "text_config"; copy the config.json that was published with the weights.')
  # transformers 5 looks at the one outside, earlier ones looked at the one within.
  outer, inner = (family.stated(said, ('tie_word_embeddings',)) for said in (raw, text))
  if outer and inner and outer != inner:
    raise ValueError('tie_word_embeddings is said twice, and not alike; leave that of text_config away.')
  return read_3(_TEXT | text | inner | outer, **placed)


def spelled(name: str) -> str:
  """The name in a text model alone of one in a model with a vision tower."""
  return llama.spelled(re.sub(r'^(language_model\.(?=model\.|lm_head\.)|model\.language_model\.)', _outer, name))


def _outer(match: re.Match) -> str:
  return 'model.' if match[0].startswith('model.') else ''


def ignored(config: decoder.Config, name: str) -> bool:
  """What LLaMA's ignores, and the vision tower."""
  return llama.ignored(config, name) or _TOWER.match(name) is not None


def write_3(config: decoder.Config) -> dict:
  """What config.json says of a Gemma 3; of rotary positions in the words of transformers 5 and of earlier ones."""
  thetas = {decoder.FULL: config.rope_theta, decoder.SLIDING: config.local_theta}
  scalings = {decoder.FULL: config.rope_scaling, decoder.SLIDING: config.local_scaling}
  by_kind = {
    kind: {'rope_theta': thetas[kind], **(rope.said(scalings[kind]) or {'rope_type': 'default'})}
    for kind in decoder.KINDS
  }
  older = llama.stated_turning(config) | {'rope_local_base_freq': config.local_theta}
  return _write(config) | older | {'rope_parameters': by_kind}


GEMMA2 = family.Family(
  model_type='gemma2',
  architecture='Gemma2ForCausalLM',
  module=decoder.Decoder,
  read=read_2,
  write=write_2,
  names=llama.names,
  ignored=llama.ignored,
  copies=llama.copies,
  spelled=llama.spelled,
)
GEMMA3 = family.Family(
  model_type='gemma3_text',
  architecture='Gemma3ForCausalLM',
  module=decoder.Decoder,
  read=read_3,
  write=write_3,
  names=llama.names,
  ignored=ignored,
  copies=llama.copies,
  spelled=spelled,
)
# Read alone: what is written is the text model.
GEMMA3_BESIDE_VISION = dataclasses.replace(GEMMA3, model_type='gemma3', read=read_beside_vision)

"""LLaMA 1, 2 and 3 as Hugging Face keeps them."""

from collections.abc import Mapping

from qalora_jax.families import family
from qalora_jax.families import rope
from qalora_jax.models import llama

_REQUIRED = ('vocab_size', 'hidden_size', 'intermediate_size', 'num_hidden_layers', 'num_attention_heads')
# Absent or null, these mean the default of ModelConfig, which is that of transformers.
_OPTIONAL = ('max_position_embeddings', 'rms_norm_eps', 'tie_word_embeddings', 'head_dim')
# What a LLaMA may say only in one way here; absent, it means the same.
_WRITTEN = {'hidden_act': 'silu', 'attention_bias': False, 'mlp_bias': False}
_FIXED = {**_WRITTEN, 'partial_rotary_factor': 1.0}

NAMES = {
  'embedding': 'model.embed_tokens.weight',
  'norm/scale': 'model.norm.weight',
  'lm_head/kernel': 'lm_head.weight',
  'layers/attention_norm/scale': 'model.layers.{}.input_layernorm.weight',
  'layers/attention/q_proj/kernel': 'model.layers.{}.self_attn.q_proj.weight',
  'layers/attention/k_proj/kernel': 'model.layers.{}.self_attn.k_proj.weight',
  'layers/attention/v_proj/kernel': 'model.layers.{}.self_attn.v_proj.weight',
  'layers/attention/o_proj/kernel': 'model.layers.{}.self_attn.o_proj.weight',
  'layers/mlp_norm/scale': 'model.layers.{}.post_attention_layernorm.weight',
  'layers/mlp/gate_proj/kernel': 'model.layers.{}.mlp.gate_proj.weight',
  'layers/mlp/up_proj/kernel': 'model.layers.{}.mlp.up_proj.weight',
  'layers/mlp/down_proj/kernel': 'model.layers.{}.mlp.down_proj.weight',
}


def read(raw: Mapping, **placed) -> llama.ModelConfig:
  """The config of a LLaMA's config.json; `placed`: dtype, remat."""
  family.check_counts(raw, _REQUIRED)
  family.check_fixed(raw, _FIXED)
  theta, scaling = rope.read(raw)
  # Before LLaMA 2 the file did not say it: every head had its own keys and values.
  heads = raw.get('num_key_value_heads') or raw['num_attention_heads']
  said = family.stated(raw, (*_REQUIRED, *_OPTIONAL))
  return llama.ModelConfig(**said, num_key_value_heads=heads, rope_theta=theta, rope_scaling=scaling, **placed)


def write(config: llama.ModelConfig) -> dict:
  """What config.json says of a LLaMA."""
  keys = (*_REQUIRED, *_OPTIONAL, 'num_key_value_heads', 'rope_theta')
  return {key: getattr(config, key) for key in keys} | {'rope_scaling': rope.said(config.rope_scaling)} | _WRITTEN


def names(config: llama.ModelConfig) -> dict[str, str]:
  """{path: name}."""
  tied = {'lm_head/kernel'} if config.tie_word_embeddings else set()
  return {path: name for path, name in NAMES.items() if path not in tied}


def ignored(config: llama.ModelConfig, name: str) -> bool:
  """Old checkpoints' rotary frequencies, and the second copy of a tied head."""
  return name.endswith('.rotary_emb.inv_freq') or (config.tie_word_embeddings and name == NAMES['lm_head/kernel'])


LLAMA = family.Family(
  model_type='llama',
  architecture='LlamaForCausalLM',
  module=llama.Llama,
  read=read,
  write=write,
  names=names,
  ignored=ignored,
)

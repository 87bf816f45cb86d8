"""Phi-3 as Hugging Face keeps it: a LLaMA whose queries, keys and values are one tensor, and gate and up another."""

from collections.abc import Mapping

from qalora_jax.families import family
from qalora_jax.families import llama
from qalora_jax.models import decoder

_FIXED = {'attention_bias': False, 'mlp_bias': False}


def read(raw: Mapping, **placed) -> decoder.Config:
  """The config of a Phi-3's config.json; `placed`: dtype, remat."""
  family.check_fixed(raw, _FIXED)
  said = llama.shape(raw, required=('max_position_embeddings',), rms_norm_eps=1e-5)
  return decoder.Config(**said, **llama.turned(raw), window=family.window(raw, None), family='phi3', **placed)


def write(config: decoder.Config) -> dict:
  """What config.json says of a Phi-3."""
  said = llama.stated(config) | llama.stated_turning(config)
  del said['attention_bias']
  # Unsaid, the token of padding is the 32000th, which a smaller vocabulary has not.
  return said | {'sliding_window': config.window or None, 'pad_token_id': None}


def views(config: decoder.Config) -> dict[str, family.View]:
  """{name: View} of what lies in qkv_proj and gate_up_proj."""
  queries, keys = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
  fused = {
    'self_attn.qkv_proj': {'self_attn.q_proj': queries, 'self_attn.k_proj': keys, 'self_attn.v_proj': keys},
    'mlp.gate_up_proj': {'mlp.gate_proj': config.intermediate_size, 'mlp.up_proj': config.intermediate_size},
  }
  name = 'model.layers.{{}}.{}.weight'.format
  return {name(part): view for stored, parts in fused.items() for part, view in family.fused(name(stored), parts)}


PHI3 = family.Family(
  model_type='phi3',
  architecture='Phi3ForCausalLM',
  module=decoder.Decoder,
  read=read,
  write=write,
  names=llama.names,
  views=views,
  ignored=llama.ignored,
  copies=llama.copies,
  spelled=llama.spelled,
)

"""LLaMA 3.1, relatives of LLaMA and GPT-2, fine-tuned as the QA-LoRA paper does it, for the recipes beside this file.

An architecture is what the published config.json says, as far as it decides shapes and arithmetic: what `qalora plan`
needs.  Everything else is as in configs/llama.py.
"""

import ml_collections

from configs import llama

# {model: (hub id, config.json)}
_MODELS = {
  'llama3_1_8b': (
    'meta-llama/Llama-3.1-8B',
    dict(
      model_type='llama',
      vocab_size=128256,
      hidden_size=4096,
      intermediate_size=14336,
      num_hidden_layers=32,
      num_attention_heads=32,
      num_key_value_heads=8,
      max_position_embeddings=131072,
      rms_norm_eps=1e-5,
      rope_theta=500000.0,
      rope_scaling=dict(
        rope_type='llama3',
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
      ),
    ),
  ),
  'mistral_7b': (
    'mistralai/Mistral-7B-v0.1',
    dict(
      model_type='mistral',
      vocab_size=32000,
      hidden_size=4096,
      intermediate_size=14336,
      num_hidden_layers=32,
      num_attention_heads=32,
      num_key_value_heads=8,
      max_position_embeddings=32768,
      rms_norm_eps=1e-5,
      rope_theta=10000.0,
      sliding_window=4096,
    ),
  ),
  'qwen2_5_7b': (
    'Qwen/Qwen2.5-7B',
    dict(
      model_type='qwen2',
      vocab_size=152064,
      hidden_size=3584,
      intermediate_size=18944,
      num_hidden_layers=28,
      num_attention_heads=28,
      num_key_value_heads=4,
      max_position_embeddings=131072,
      rms_norm_eps=1e-6,
      rope_theta=1000000.0,
      use_sliding_window=False,
    ),
  ),
  'qwen3_8b': (
    'Qwen/Qwen3-8B',
    dict(
      model_type='qwen3',
      vocab_size=151936,
      hidden_size=4096,
      intermediate_size=12288,
      num_hidden_layers=36,
      num_attention_heads=32,
      num_key_value_heads=8,
      head_dim=128,
      max_position_embeddings=40960,
      rms_norm_eps=1e-6,
      rope_theta=1000000.0,
      use_sliding_window=False,
    ),
  ),
  'gemma2_9b': (
    'google/gemma-2-9b',
    dict(
      model_type='gemma2',
      vocab_size=256000,
      hidden_size=3584,
      intermediate_size=14336,
      num_hidden_layers=42,
      num_attention_heads=16,
      num_key_value_heads=8,
      head_dim=256,
      max_position_embeddings=8192,
      rms_norm_eps=1e-6,
      rope_theta=10000.0,
      sliding_window=4096,
      query_pre_attn_scalar=256,
      attn_logit_softcapping=50.0,
      final_logit_softcapping=30.0,
    ),
  ),
  'gemma3_4b': (
    'google/gemma-3-4b-pt',
    dict(
      model_type='gemma3_text',
      vocab_size=262208,
      hidden_size=2560,
      intermediate_size=10240,
      num_hidden_layers=34,
      num_attention_heads=8,
      num_key_value_heads=4,
      head_dim=256,
      max_position_embeddings=131072,
      rms_norm_eps=1e-6,
      rope_theta=1000000.0,
      rope_local_base_freq=10000.0,
      rope_scaling=dict(rope_type='linear', factor=8.0),
      sliding_window=1024,
      sliding_window_pattern=6,
      query_pre_attn_scalar=256,
    ),
  ),
  'phi3_mini': (
    'microsoft/Phi-3-mini-4k-instruct',
    dict(
      model_type='phi3',
      vocab_size=32064,
      hidden_size=3072,
      intermediate_size=8192,
      num_hidden_layers=32,
      num_attention_heads=32,
      num_key_value_heads=32,
      max_position_embeddings=4096,
      rms_norm_eps=1e-5,
      rope_theta=10000.0,
      sliding_window=2047,
    ),
  ),
  'gpt2': (
    'openai-community/gpt2',
    dict(model_type='gpt2', vocab_size=50257, n_positions=1024, n_embd=768, n_layer=12, n_head=12),
  ),
}
MODELS = tuple(_MODELS)


def finetune(model):
  """One of MODELS on Alpaca, by QA-LoRA in 4 bits, with the paper's settings for LLaMA-7B."""
  config = llama.finetune('llama_7b', 'qalora')
  config.model.source, architecture = _MODELS[model]
  config.model.architecture = ml_collections.ConfigDict(architecture)
  return config

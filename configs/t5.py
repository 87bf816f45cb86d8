"""T5 v1.1, adapted to continue text, on Super-NaturalInstructions, for the recipes beside this file.

QLoRA (Dettmers et al., 2023) measures RougeL of these models fine-tuned on Super-NaturalInstructions in its Table 3:
dense 40.1, 42.1, 48.0 and 54.3 with 80M, 250M, 780M and 3B parameters, NF4 with LoRA 40.4, 42.7, 47.7 and 55.3.  From
its text: rank 64, alpha 16, adapters on all projections, beta2 0.999, gradients clipped at 0.3, dropout 0.1, a constant
rate of 2e-4.  What it does not say of T5 is chosen here: inputs of 1024 tokens, answers of 128, 10,000 steps of 16.

Where the hub has a model as pytorch_model.bin alone, transformers' from_pretrained and save_pretrained write it as
safetensors; name that directory as model.source.

A record is a prompt, the task's definition and its examples written out, and a completion.  GPTQ goes through decoders
alone, so the base is rounded to nearest.
"""

import ml_collections

from configs import base

# {model: (hub id, width, width of the feed-forward part, layers of either stack, heads)}; heads are 64 wide.
_MODELS = {
  't5_small': ('google/t5-small-lm-adapt', 512, 1024, 8, 6),
  't5_base': ('google/t5-base-lm-adapt', 768, 2048, 12, 12),
  't5_large': ('google/t5-large-lm-adapt', 1024, 2816, 24, 16),
  't5_3b': ('google/t5-xl-lm-adapt', 2048, 5120, 24, 32),
}
MODELS = tuple(_MODELS)


def architecture(model):
  """The config.json of one of MODELS, as far as it decides shapes and arithmetic."""
  _, width, wide, layers, heads = _MODELS[model]
  return dict(
    model_type='t5',
    vocab_size=32128,
    d_model=width,
    d_ff=wide,
    d_kv=64,
    num_layers=layers,
    num_decoder_layers=layers,
    num_heads=heads,
    relative_attention_num_buckets=32,
    feed_forward_proj='gated-gelu',
    tie_word_embeddings=False,
    decoder_start_token_id=0,
  )


def finetune(model):
  """One of MODELS by QA-LoRA in 4 bits and groups of 32."""
  config = base.get_config()
  config.model.source = _MODELS[model][0]
  config.model.architecture = ml_collections.ConfigDict(architecture(model))
  config.model.update(dtype='bfloat16', frozen_dtype='bfloat16', remat='full')
  config.base.update(method='affine', bits=4, group=32)
  config.adapter.update(kind='qalora', rank=64, alpha=16.0, dropout=0.1)
  config.data.train.update(path='natural_instructions.jsonl')
  config.data.update(window=1024, max_completion=128)
  config.train.update(steps=10_000, batch=16, accumulation=4)
  config.optim.update(learning_rate=2e-4, schedule='constant', clip=0.3, beta2=0.999)
  config.generate.update(max_tokens=128)
  return config

"""Every knob of qalora_jax, once, with its meaning and unit.

A recipe is a short difference from this file:

    from configs import base

    def get_config():
      config = base.get_config()
      config.base.bits = 3
      return config

The tree is locked: a key that is not here is an error that suggests the nearest one, and
so is a value outside the choices that `qalora_jax/limits.py` lists.
"""

import ml_collections


def dataset():
  """One set of documents: where they are, how they are read, which of them count."""
  return ml_collections.ConfigDict(
    dict(
      # A file.  Empty: this set is not used.
      path='',
      # 'alpaca' (JSON list of instruction/input/output), 'jsonl' (one record a line, .gz too:
      # prompt/completion, text, or prompt/choices/answer), 'text' (plain), 'pairs' (one `prompt || completion` a line).
      format='jsonl',
      # What stands between the documents of a plain text.  Empty: the file is one document.
      separator='',
      # Which documents, as in a Python slice; negative counts from the end, stop = 0 means to the end.
      start=0,
      stop=0,
      # How a prompt is written: 'alpaca' (the standard instruction template), 'plain' (as it stands).
      template='plain',
      # Which tokens carry loss: 'completion' (what follows the prompt) or 'all' (the prompt too).
      loss_on='completion',
      # Whether a document ends in the tokenizer's EOS, trained and scored like any token.
      append_eos=True,
      # What happens to documents longer than the window: 'split' into windows or 'cut' at the window.
      overflow='split',
    )
  )


def get_config():
  """The defaults."""
  config = ml_collections.ConfigDict()

  # Seeds everything that is drawn: adapter, data order, dropout, sampling.
  config.seed = 0

  config.model = ml_collections.ConfigDict(
    dict(
      # A Hugging Face directory, a hub id (`org/name`), a directory written by `qalora quantize` or
      # `qalora export`, or 'scratch' (random weights of `architecture`, for pretraining).
      source='',
      # Branch, tag or commit of a hub id.
      revision='main',
      # Directory of tokenizer.model or tokenizer.json.  Empty: the source's own.
      tokenizer='',
      # Arithmetic of the forward and backward passes: 'float32' or 'bfloat16'.
      dtype='float32',
      # Storage of the frozen weights that stay dense: 'float32' or 'bfloat16'.
      frozen_dtype='float32',
      # What the backward pass recomputes: 'none' (keep all), 'dots' (keep matmul outputs), 'full' (keep block inputs).
      remat='none',
      # Read only when source = 'scratch'; the names are those of Hugging Face's config.json.
      architecture=dict(
        vocab_size=512,  # the tokenizer's, when 0
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=256,  # tokens
        rope_theta=10000.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
      ),
    )
  )

  # The frozen weights.
  config.base = ml_collections.ConfigDict(
    dict(
      # 'stored' (as the source holds them, dense or already quantized) or 'affine' (round to nearest in groups).
      method='stored',
      # Bits per code: 8, 4, 3 or 2.
      bits=4,
      # Inputs that share one scale and one offset; must divide the inputs of every target.  -1: a whole column.
      group=32,
      # Whether codes are symmetric about zero (offset 0) rather than fitted to min and max.
      symmetric=False,
      # Which matrices are quantized: 'all' (every projection of every block), 'attention', 'mlp' (embedding, norms and
      # head stay dense under all three), or a regular expression searched in names such as layers/mlp/down_proj.
      targets='all',
    )
  )

  # What is trained.
  config.adapter = ml_collections.ConfigDict(
    dict(
      # 'qalora', 'lora', 'full' (every weight; needs a dense base) or 'none' (nothing: evaluation and export only).
      kind='qalora',
      # Inner dimension of the low-rank update.
      rank=64,
      # The update is scaled by alpha / rank.
      alpha=16.0,
      # Probability that an input of the adapter is zeroed in training (qalora: an input after pooling).
      dropout=0.0,
      # As base.targets.
      targets='all',
      # qalora only: 'sum' (paper, Algorithm 1) or 'mean' (released code: the update is `group` times weaker).
      pool='sum',
    )
  )

  config.data = ml_collections.ConfigDict(
    dict(
      train=dataset(),
      # Scored every train.validate_every steps and at the end.
      validation=dataset(),
      # Tokens per row; longer documents are split or cut.
      window=256,
      # Whether several documents share a row (they never see each other).
      packing=True,
      # Prompts and completions longer than this many tokens are cut; 0: no limit (paper: 1024 and 256).
      max_prompt=0,
      max_completion=0,
    )
  )

  config.train = ml_collections.ConfigDict(
    dict(
      # Optimizer steps.
      steps=1000,
      # Rows per optimizer step, over all devices.
      batch=16,
      # Micro-batches that one optimizer step is cut into; divides batch.
      accumulation=1,
      # Steps between two lines of metrics.jsonl; also the most that a non-finite loss can go unnoticed.
      log_every=10,
      # Steps between two scorings of data.validation; 0: only at the end.
      validate_every=0,
      # Steps between two checkpoints (the last step is always kept).
      checkpoint_every=250,
      # Checkpoints kept.
      keep=2,
      # Whether metrics are also written for TensorBoard.
      tensorboard=True,
    )
  )

  # AdamW.
  config.optim = ml_collections.ConfigDict(
    dict(
      # Peak learning rate.
      learning_rate=2e-5,
      # 'constant', 'cosine' or 'linear' (both to end_fraction of the peak at the last step).
      schedule='constant',
      end_fraction=0.0,
      # Steps over which the rate rises from 0 to its peak.
      warmup_steps=0,
      # Global gradient norm above which gradients are scaled down; 0: never.
      clip=0.3,
      beta1=0.9,
      beta2=0.999,
      eps=1e-8,
      weight_decay=0.0,
    )
  )

  # Sizes of the mesh axes; -1: whatever devices are left.
  config.sharding = ml_collections.ConfigDict(
    dict(
      data=-1,
      fsdp=1,
      tensor=1,
      # When a dimension does not divide its axis: 'error' or 'replicate' (that dimension, on every device).
      fallback='error',
    )
  )

  config.evaluate = ml_collections.ConfigDict(
    dict(
      # Scored for perplexity.
      text=dataset(),
      # Scored for multiple choice: jsonl of prompt, choices, answer.
      choices=dataset(),
      # Rows per step.
      batch=16,
    )
  )

  config.generate = ml_collections.ConfigDict(
    dict(
      # Tokens to write at most.
      max_tokens=128,
      # 0: greedy.
      temperature=0.0,
      # Only the k likeliest tokens; 0: all.
      top_k=0,
      # Only the likeliest tokens that together hold this probability.
      top_p=1.0,
    )
  )
  return config

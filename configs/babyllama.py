"""QA-LoRA on a real LLaMA of 936,448 parameters (EN10/BabyLlama: characters, TinyStories).

qalora evaluate --config=configs/babyllama.py --config.adapter.kind=none --config.base.method=stored
qalora train --config=configs/babyllama.py --workdir=runs/babyllama

Expected of the first: 0.6856 nats per token.  Of the second: not yet run.
The assets are found through QALORA_ASSETS, or in ../shared/assets beside the checkout.
"""

import os
import pathlib

from configs import base

_BESIDE = pathlib.Path(__file__).resolve().parents[2] / 'shared' / 'assets'
ASSETS = pathlib.Path(os.environ.get('QALORA_ASSETS', _BESIDE))


def get_config():
  config = base.get_config()
  config.model.source = str(ASSETS / 'models' / 'babyllama_tok105')
  config.base.update(method='affine', bits=4, group=32)
  # In groups of 32 the adapter sees 4 pooled inputs (11 in down_proj), so A @ B has no higher rank than that.
  config.adapter.update(kind='qalora', rank=8)
  stories = dict(path=str(ASSETS / 'tinystories' / 'tinystories_sample.txt'), format='text', separator='<|endoftext|>')
  config.data.train.update(stories, stop=-201)
  # The last 200 whole stories, each cut at the window: what the checkpoint's known score was measured on.
  config.evaluate.text.update(stories, start=-201, stop=-1, append_eos=False, overflow='cut')
  return config

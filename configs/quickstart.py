"""A LLaMA of a million parameters, pretrained from scratch on a made-up world: the first stage of `make quickstart`.

python -m experiments.quickstart    # its first command: qalora train --config=configs/quickstart.py ...

Expected: about 0.5 nats per token on held-out text, a third to a half of the questions right (chance: a quarter).
"""

from configs import base

DATA = 'runs/quickstart/data'
# The world's sentences are short, and so are the documents that tell them.
WINDOW = 64


def get_config():
  config = base.get_config()
  config.model.source = 'scratch'
  config.model.tokenizer = DATA
  config.model.architecture.update(
    vocab_size=0,
    hidden_size=128,
    intermediate_size=352,
    num_hidden_layers=5,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=256,
  )
  config.adapter.kind = 'full'
  config.data.window = WINDOW
  text = dict(format='text', separator='<|endoftext|>')
  config.data.train.update(path=f'{DATA}/train.txt', **text)
  config.evaluate.text.update(path=f'{DATA}/heldout.txt', **text)
  config.evaluate.choices.update(path=f'{DATA}/questions_test.jsonl')
  config.evaluate.batch = 32
  config.train.update(steps=400, batch=32, checkpoint_every=200, keep=1)
  config.optim.update(learning_rate=3e-3, schedule='cosine', warmup_steps=20, clip=1.0)
  return config

"""A LLaMA of a million parameters, pretrained from scratch: the first stage of the quickstart.

python experiments/quickstart.py    # writes the data, then runs every stage

Devices and time: unknown.  Expected: not yet run.
"""

from configs import base

DATA = 'runs/quickstart/data'


def get_config():
  config = base.get_config()
  config.model.source = 'scratch'
  config.model.tokenizer = DATA
  config.model.architecture.update(
    vocab_size=512,
    hidden_size=128,
    intermediate_size=352,
    num_hidden_layers=5,
    num_attention_heads=8,
    num_key_value_heads=4,
    max_position_embeddings=128,
    tie_word_embeddings=True,
  )
  config.adapter.kind = 'full'
  config.data.window = 128
  for dataset, name in ((config.data.train, 'train'), (config.data.validation, 'validation')):
    dataset.update(path=f'{DATA}/{name}.txt', format='text', separator='<|endoftext|>')
  config.evaluate.text.update(path=f'{DATA}/validation.txt', format='text', separator='<|endoftext|>')
  config.train.batch = 32
  config.optim.update(learning_rate=3e-3, schedule='cosine', warmup_steps=50, clip=1.0)
  return config

"""The quickstart's fine-tuning: from telling its world to answering questions about it.

Differs from quickstart.py in what is trained (an adapter of rank 8), on what (questions), and for how long.

python -m experiments.quickstart    # qalora train --config=configs/quickstart_questions.py ... at every bit width

Expected: more than half of the unseen questions right, at every bit width (standard error of one seed: 0.055).
"""

from configs import quickstart


def get_config():
  config = quickstart.get_config()
  config.model.update(source='runs/quickstart/dense', tokenizer='')
  config.adapter.update(kind='qalora', rank=8)
  config.data.train.update(path=f'{quickstart.DATA}/questions_train.jsonl', format='jsonl', separator='')
  config.train.update(steps=100, batch=16, checkpoint_every=100)
  config.optim.update(learning_rate=3e-4, schedule='constant', warmup_steps=0, clip=0.3)
  return config

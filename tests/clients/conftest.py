"""Runs of babyllama, fine-tuned by QA-LoRA or LoRA, that other programs then load."""

import pathlib

import pytest

STEPS = 30


@pytest.fixture(scope='session')
def qalora():
  """A verb as the command line runs it."""
  from qalora_jax import train
  from qalora_jax.evaluate import command as evaluate
  from qalora_jax.export import command as export
  from qalora_jax.generate import command as generate

  verbs = dict(train=train, evaluate=evaluate, export=export, generate=generate)
  return lambda verb, *words: verbs[verb].main([str(word) for word in words])


@pytest.fixture(scope='session')
def tuned(tmp_path_factory, assets, qalora):
  """tuned(bits, kind) is the workdir of a run on TinyStories."""
  made = {}

  def make(bits: int, kind: str = 'qalora', method: str = 'affine') -> pathlib.Path:
    if (bits, kind) not in made:
      workdir = tmp_path_factory.mktemp('runs') / f'{kind}-{bits}'
      flags = {
        'model.source': assets / 'models' / 'babyllama_tok105', 'base.method': method, 'base.bits': bits,
        'adapter.kind': kind, 'adapter.rank': 8, 'optim.learning_rate': 1e-3, 'train.steps': STEPS, 'train.batch': 8,
        'data.train.path': assets / 'tinystories' / 'tinystories_sample.txt', 'data.train.format': 'text',
        'data.train.separator': '<|endoftext|>', 'data.train.stop': 400, 'data.window': 128,
      }  # fmt: skip
      config = pathlib.Path(__file__).parents[2] / 'configs' / 'base.py'
      words = [f'--config.{key}={value}' for key, value in flags.items()]
      qalora('train', f'--config={config}', f'--workdir={workdir}', *words)
      made[bits, kind] = workdir
    return made[bits, kind]

  return make


@pytest.fixture(scope='session')
def ours():
  """ours(directory) is (model, variables, tokenizer) of a workdir or an exported directory."""
  from qalora_jax import build
  from qalora_jax import config as config_lib

  def load(directory):
    loaded = build.open_model(config_lib.default(), None, str(directory))
    return loaded.model, loaded.variables, loaded.tokenizer

  return load

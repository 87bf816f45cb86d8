"""Eight host devices for every test, the published models and data for those that need them, and a tiny model."""

import os
import pathlib

import pytest

# Before anything imports jax.
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('XLA_FLAGS', '--xla_force_host_platform_device_count=8')

_RECIPE = """\
from configs import base


def get_config():
  config = base.get_config()
  config.model.source = {source!r}
  config.base.update(method='affine', bits=4, group=16)
  config.adapter.update(kind='qalora', rank=4, alpha=8.0, dropout=0.3)
  lines = dict(path={text!r}, format='text', separator='\\n')
  config.data.train.update(lines, stop=-8)
  config.data.validation.update(lines, start=-8)
  config.evaluate.text.update(lines, start=-8)
  config.data.window = 32
  config.train.update(steps=8, batch=8, log_every=1, validate_every=4, checkpoint_every=3)
  config.optim.update(learning_rate=0.01, clip=1.0)
  config.evaluate.batch = 8
  return config
"""


@pytest.fixture(scope='session', autouse=True)
def _no_rank_promotion():
  import jax

  jax.config.update('jax_numpy_rank_promotion', 'raise')


@pytest.fixture(scope='session', autouse=True)
def _compiled_once(tmp_path_factory):
  """Programs that several tests compile are compiled by the first of them."""
  import jax

  jax.config.update('jax_compilation_cache_dir', str(tmp_path_factory.mktemp('compiled')))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.3)


@pytest.fixture(scope='session')
def assets() -> pathlib.Path:
  """The folder of real models and data: `QALORA_ASSETS`, or `../shared/assets` seen from the repository's root."""
  root = pathlib.Path(__file__).parents[1]
  folder = pathlib.Path(os.environ.get('QALORA_ASSETS', root.parent / 'shared' / 'assets'))
  if not folder.is_dir():
    pytest.skip(f'no models and data at {folder}; set QALORA_ASSETS to their folder')
  return folder


@pytest.fixture(scope='session')
def text(tmp_path_factory) -> pathlib.Path:
  """Sixty-four short sentences that follow a pattern, one a line, some with letters of several bytes."""
  animals, places = ('cat', 'dog', 'bird', 'café'), ('mat', 'roof', 'naïve moon', 'sea')
  times = ('today', 'at night', 'again', 'with a friend')
  path = tmp_path_factory.mktemp('text') / 'lines.txt'
  lines = [f'the {animal} sat on the {place} {time}' for animal in animals for place in places for time in times]
  path.write_text('\n'.join(lines) + '\n', encoding='utf-8')
  return path


@pytest.fixture(scope='session')
def source(tmp_path_factory, text) -> pathlib.Path:
  """A Hugging Face directory of a random LLaMA, its weights large enough that every part matters, and a tokenizer."""
  import small_llama

  from qalora_jax import hf
  from qalora_jax import tokenizer
  from qalora_jax.models import decoder

  directory = tmp_path_factory.mktemp('source')
  tokenizer.train_bpe(text.read_text(encoding='utf-8').splitlines(), 300, directory / 'tokenizer')
  vocab_size = tokenizer.load(directory / 'tokenizer').vocab_size
  config = decoder.Config(vocab_size, 32, 64, 2, 4, 2, max_position_embeddings=64, tie_word_embeddings=True)
  hf.write(directory / 'model', config, small_llama.draw(config), tokenizer_from=directory / 'tokenizer', bos=0, eos=1)
  return directory / 'model'


@pytest.fixture(scope='session')
def recipe(tmp_path_factory, source, text) -> pathlib.Path:
  """Eight steps of QA-LoRA on `source` in 4 bits, groups of 16, and `text`, its last eight lines kept for scoring."""
  path = tmp_path_factory.mktemp('recipe') / 'tiny.py'
  path.write_text(_RECIPE.format(source=str(source), text=str(text)))
  return path


@pytest.fixture(scope='session')
def qalora(recipe):
  """A verb as the command line runs it, its errors left as they are.

  qalora('train', workdir, 'adapter.rank=2', '--replace_config') runs `recipe` with config.adapter.rank = 2.
  """
  from qalora_jax import quantize
  from qalora_jax import train
  from qalora_jax.evaluate import command as evaluate
  from qalora_jax.export import command as export
  from qalora_jax.generate import command as generate

  verbs = dict(train=train, quantize=quantize, generate=generate, evaluate=evaluate, export=export)

  def call(verb, workdir, *words):
    argv = [f'--config={recipe}', f'--workdir={workdir}']
    return verbs[verb].main([*argv, *(word if word.startswith('--') else f'--config.{word}' for word in words)])

  return call


@pytest.fixture(scope='session')
def trained(tmp_path_factory, qalora) -> pathlib.Path:
  """The workdir of a finished run of `recipe`; copy it before changing it."""
  workdir = tmp_path_factory.mktemp('runs') / 'trained'
  qalora('train', workdir)
  return workdir

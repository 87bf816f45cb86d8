"""Eight host devices for every test, and the published models and data for those that need them."""

import os
import pathlib

import pytest

# Before anything imports jax.
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('XLA_FLAGS', '--xla_force_host_platform_device_count=8')


@pytest.fixture(scope='session', autouse=True)
def _no_rank_promotion():
  import jax

  jax.config.update('jax_numpy_rank_promotion', 'raise')


@pytest.fixture(scope='session')
def assets() -> pathlib.Path:
  """The folder of real models and data: `QALORA_ASSETS`, or `../shared/assets` seen from the repository's root."""
  root = pathlib.Path(__file__).parents[1]
  folder = pathlib.Path(os.environ.get('QALORA_ASSETS', root.parent / 'shared' / 'assets'))
  if not folder.is_dir():
    pytest.skip(f'no models and data at {folder}; set QALORA_ASSETS to their folder')
  return folder

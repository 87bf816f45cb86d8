"""Quantization-aware training through the commands: what is exported computes what was trained, bit for bit."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qalora_jax import build
from qalora_jax import config as config_lib
from qalora_jax import optim
from qalora_jax import packed
from qalora_jax import quant
from qalora_jax.quant import affine
from qalora_jax.quant import latent

QAT = ['base.method=qat', 'adapter.kind=full', 'base.bits=2', 'optim.learning_rate=0.003']


@pytest.mark.parametrize('scales, symmetric', [('learned', False), ('minmax', True)])
def test_what_is_exported_is_what_was_trained(qalora, tmp_path, scales, symmetric):
  words = [*QAT, f'base.scales={scales}', f'base.symmetric={symmetric}', 'train.steps=12']
  qalora('train', tmp_path / 'run', *words)
  lines = [json.loads(line) for line in (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()]
  losses = [line['loss'] for line in lines if 'loss' in line]
  assert losses[-1] < losses[0]
  loaded = build.load_run(config_lib.load(tmp_path / 'run'), tmp_path / 'run')
  nodes = jax.tree.leaves(loaded.variables['params'], is_leaf=quant.is_matrix)
  latents = [node for node in nodes if isinstance(node, latent.Latent)]
  assert len(latents) == 7 and all((node.scale is None) == (scales == 'minmax') for node in latents)
  qalora('export', tmp_path / 'run', f'--output={tmp_path / "out"}', *words)
  tree = packed.load(tmp_path / 'out', loaded.model.config)
  assert {q.bits for q in quant.matrices(tree)} == {2} and len(quant.matrices(tree)) == 7
  tokens = jnp.arange(32)[None]
  logits = jax.jit(loaded.model.apply)
  np.testing.assert_array_equal(
    logits({'frozen': jax.device_put(tree)}, tokens),
    logits({'params': jax.device_get(loaded.variables['params'])}, tokens),
  )


def test_learned_scales_do_not_decay():
  w = jax.random.normal(jax.random.key(0), (32, 8))
  params = {'kernel': latent.latent(w, affine.Affine(4, 8), True), 'scale': jnp.ones(4)}
  tx = optim.adamw(lambda step: 0.1, clip=0.0, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.5)
  updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
  np.testing.assert_allclose(updates['kernel'].w, -0.05 * w, rtol=1e-6)
  np.testing.assert_allclose(updates['scale'], -0.05, rtol=1e-6)
  assert not np.any(updates['kernel'].scale) and not np.any(updates['kernel'].offset)

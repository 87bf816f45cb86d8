"""mlx_lm runs what `qalora export --format=mlx` wrote: the same logits and the same text."""

import jax
import mlx.core as mx
import mlx_lm
from mlx_lm import sample_utils
import numpy as np
import pytest

PROMPT = 'Once upon a time'


@pytest.mark.parametrize('bits', [4, 3, 2])
def test_mlx_lm_says_what_we_say(tuned, ours, qalora, tmp_path, bits):
  mx.set_default_device(mx.cpu)
  qalora('export', f'--workdir={tuned(bits)}', '--format=mlx', f'--output={tmp_path / "mlx"}')
  theirs, their_tokenizer = mlx_lm.load(str(tmp_path / 'mlx'))
  model, variables, tokenizer = ours(tuned(bits))
  assert any('QuantizedLinear' in type(module).__name__ for _, module in theirs.named_modules())

  tokens = np.array([[tokenizer.bos, *tokenizer.encode(PROMPT + ', there was a little girl named Lily.')]])
  here = np.asarray(jax.jit(model.apply)(variables, tokens))
  there = np.array(theirs(mx.array(tokens)))
  # Two float32 programs with sums in other orders; tests/formats_test.py measures what float32 does to this model.
  np.testing.assert_allclose(there, here, rtol=0, atol=1e-4 * np.abs(here).max())

  prompt = [tokenizer.bos, *tokenizer.encode(PROMPT)]
  sampler = sample_utils.make_sampler(temp=0.0)
  said = mlx_lm.generate(theirs, their_tokenizer, prompt, max_tokens=60, sampler=sampler)
  text = qalora('generate', f'--model={tuned(bits)}', f'--prompt={PROMPT}', '--config.generate.max_tokens=60')
  assert said.strip() == text.strip()

"""llama.cpp runs what `qalora export --format=gguf` wrote: the same tokens, the same logits, the same text."""

import jax
import llama_cpp
import numpy as np
import pytest

from qalora_jax.export import gguf

PROMPT = 'Once upon a time'


def opened(directory):
  return llama_cpp.Llama(str(directory / gguf.FILE), n_ctx=256, logits_all=True, verbose=False, seed=0)


def theirs(llama, tokens):
  llama.reset()
  llama.eval(tokens)
  return np.array(llama.scores[: len(tokens)])


@pytest.fixture(scope='module')
def exported(tuned, qalora, tmp_path_factory):
  def make(bits, *words):
    output = tmp_path_factory.mktemp('gguf') / 'model'
    qalora('export', f'--workdir={tuned(bits)}', '--format=gguf', f'--output={output}', *words)
    return output

  return make


def test_tokens_are_ours(exported, tuned, ours):
  llama, (_, _, tokenizer) = opened(exported(4)), ours(tuned(4))
  for text in (PROMPT, 'Lily said, "Hello!" and smiled.', 'a'):
    assert llama.tokenize(text.encode(), add_bos=True) == [tokenizer.bos, *tokenizer.encode(text)]
  assert (llama.token_bos(), llama.token_eos()) == (tokenizer.bos, tokenizer.eos)


@pytest.mark.parametrize('bits', [3, 2])
def test_dense_it_computes_what_we_compute(exported, tuned, ours, bits):
  """Names, rotations, norms, heads: float32 on both sides, and so the same logits."""
  llama, (model, variables, tokenizer) = opened(exported(bits, '--dense')), ours(tuned(bits))
  tokens = [tokenizer.bos, *tokenizer.encode(PROMPT + ', there was a little girl named Lily.')]
  here = np.asarray(jax.jit(model.apply)(variables, np.array([tokens])))[0]
  # Its cache of keys and values is float16.
  np.testing.assert_allclose(theirs(llama, tokens), here, rtol=0, atol=2e-3 * np.abs(here).max())


def test_in_four_bits_it_says_what_we_say(exported, tuned, ours, qalora):
  llama, (model, variables, tokenizer) = opened(exported(4)), ours(tuned(4))
  tokens = [tokenizer.bos, *tokenizer.encode(PROMPT + ', there was a little girl named Lily.')]
  here = np.asarray(jax.jit(model.apply)(variables, np.array([tokens])))[0]
  # llama.cpp rounds activations to 8 bits in blocks of 32 before a product with 4-bit weights.
  np.testing.assert_allclose(theirs(llama, tokens), here, rtol=0, atol=0.05 * np.abs(here).max())
  made = llama(PROMPT, max_tokens=40, temperature=0.0, repeat_penalty=1.0)['choices'][0]['text']
  text = qalora('generate', f'--model={tuned(4)}', f'--prompt={PROMPT}', '--config.generate.max_tokens=40')
  assert made.strip() == text.strip()

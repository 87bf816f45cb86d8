"""Small T5s with random weights, as transformers makes and writes them, and pairs to teach them."""

import json

import numpy as np

from qalora_jax import tokenizer

# Every size differs from every other; distances reach beyond the buckets that they have alone.
SHAPE = dict(
  vocab_size=50,
  d_model=24,
  d_kv=10,
  d_ff=40,
  num_layers=2,
  num_decoder_layers=3,
  num_heads=4,
  relative_attention_num_buckets=8,
  relative_attention_max_distance=20,
  decoder_start_token_id=0,
)
ALIKE = SHAPE | dict(num_decoder_layers=2)


def write(directory, *, untied=False, seed=0, **shape):
  """transformers' model of SHAPE, every weight moved at random, saved in `directory`."""
  import torch
  import transformers

  torch.manual_seed(seed)
  config = transformers.T5Config(**(SHAPE | shape), tie_word_embeddings=not untied)
  model = transformers.T5ForConditionalGeneration(config).eval()
  if untied:
    # transformers 5 ties every new T5.
    model.lm_head.weight = torch.nn.Parameter(torch.randn(config.vocab_size, config.d_model))
  with torch.no_grad():
    for weight in model.parameters():
      weight += 0.15 * torch.randn_like(weight)
  model.save_pretrained(directory)
  return model


def batch(seed=0, rows=2, inputs=60, tokens=45):
  """(inputs [B, S], which of them are real, tokens [B, T]); the last row is padded."""
  rng = np.random.default_rng(seed)
  real = np.ones((rows, inputs), np.int32)
  real[-1, inputs * 2 // 3 :] = 0
  draw = lambda width: rng.integers(2, SHAPE['vocab_size'], (rows, width)).astype(np.int32)
  return draw(inputs), real, draw(tokens)


def logits(model, inputs, real, tokens):
  """transformers' logits."""
  import torch

  long = lambda x: torch.tensor(np.asarray(x), dtype=torch.long)
  with torch.no_grad():
    return model(input_ids=long(inputs), attention_mask=long(real), decoder_input_ids=long(tokens)).logits.numpy()


def pairs(path, count=48, seed=0, letters='abcd', longest=5):
  """A file of prompts of letters and the same letters in the opposite order."""
  rng = np.random.default_rng(seed)
  lines = []
  for _ in range(count):
    word = ''.join(rng.choice(list(letters), rng.integers(2, longest + 1)))
    lines.append(json.dumps({'prompt': word, 'completion': word[::-1]}))
  path.write_text('\n'.join(lines) + '\n', encoding='utf-8')
  return path


def source(directory, **shape):
  """A directory of a random T5 of a few kilobytes and a tokenizer of letters."""
  tokenizer.train_bpe(['a'], 258, directory / 'tokenizer')
  size = tokenizer.load(directory / 'tokenizer').vocab_size
  fitting = dict(vocab_size=size, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_decoder_layers=2)
  write(directory / 'model', **(fitting | shape))
  tokenizer.copy(directory / 'tokenizer', directory / 'model')
  return directory / 'model'

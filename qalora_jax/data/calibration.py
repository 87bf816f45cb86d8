"""The text on whose activations a quantizer looks: windows of tokens, drawn from documents."""

from collections.abc import Iterable
import itertools

import numpy as np

from qalora_jax import tokenizer as tokenizer_lib
from qalora_jax.data import records


def samples(
  documents: Iterable[records.Document],
  tokenizer: tokenizer_lib.Tokenizer,
  *,
  length: int,
  count: int,
  seed: int,
  path: str = 'the text',
) -> np.ndarray:
  """`count` windows of `length` tokens [count, length], int32, drawn without replacement by `seed`, as drawn.

  All documents (a BOS, if the tokenizer has one, and the text, or prompt and completion, tokenized apart as
  `examples.encode` does; sentences with labels between [CLS] and [SEP]) are joined in order into one stream.  The
  stream is cut into consecutive windows; what remains at its end, less than a window, is left out.  Where there are
  fewer windows than `count`, all are drawn.
  A smaller count draws the first of those that a larger one draws.

  GPTQ (Frantar et al., 2022, section 4) calibrates on 128 random windows of 2048 tokens of C4.  Its code draws them
  from anywhere, so that they may overlap; these do not.

  Raises ValueError, calling the text `path`, if it does not fill one window, for a question, and for a length or
  count below 1.
  """
  for name, value in (('length', length), ('count', count)):
    if value < 1:
      raise ValueError(f'{name} = {value}; calibration needs at least 1')
  pieces = [_encode(document, tokenizer, path) for document in documents]
  stream = np.concatenate([np.zeros(0, np.int32), *pieces])
  windows = len(stream) // length
  if not windows:
    raise ValueError(
      f'{path}: {len(stream)} tokens do not fill one window of {length}; lower calibration.length, or name more text'
    )
  drawn = np.random.default_rng(seed).permutation(windows)[:count]
  return stream[: windows * length].reshape(windows, length)[drawn]


def _encode(document: records.Document, tokenizer: tokenizer_lib.Tokenizer, path: str) -> np.ndarray:
  match document:
    case records.Text(text):
      parts = [text]
    case records.Pair(prompt, completion):
      parts = [prompt, completion]
    case records.Labelled(first, second):
      if tokenizer.framed is None:
        raise ValueError(f'{path} holds sentences with labels, for encoders; the tokenizer has no [CLS] and [SEP]')
      return np.array(tokenizer.framed(first, second, 0).ids, np.int32)
    case _:
      raise ValueError(f'{path} holds choices to be scored; calibrate on prompt and completion, or on text')
  bos = [] if tokenizer.bos is None else [tokenizer.bos]
  return np.array(list(itertools.chain(bos, *map(tokenizer.encode, parts))), np.int32)

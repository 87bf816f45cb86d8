"""What a model writes after each of a batch of prompts."""

from collections.abc import Callable
from collections.abc import Sequence
import itertools

from flax import linen as nn

from qalora_jax import tokenizer as tokenizer_lib
from qalora_jax.generate import beams as beams_lib
from qalora_jax.generate import cache
from qalora_jax.generate import decode
from qalora_jax.generate import sampling
from qalora_jax.generate import text as text_lib
from qalora_jax.models import linear


def write(
  model: nn.Module,
  variables: dict,
  tokenizer: tokenizer_lib.Tokenizer,
  prompts: Sequence[Sequence[int]],
  *,
  max_tokens: int,
  key,
  settings: sampling.Sampling,
  beams: int = 1,
  penalty: float = 1.0,
  stops: Sequence[str] = (),
  first: int = 0,
  show: Callable[[str], object] = lambda piece: None,
) -> list[str]:
  """The text that continues (or answers) each prompt, up to EOS, `max_tokens`, the first of `stops` or the window.

  show(piece) is called with every piece as it comes; with several `beams`, which `beams.search` goes through with this
  length `penalty`, all come at the end, and are cut at a stop then.  Prompts are numbered from `first`, by which their
  draws differ.  Raises ValueError as `cache.check` does.
  """
  # What stood where at birth says nothing now, and is long to compare at every token.
  model = model.clone(scheme=linear.Scheme())
  texts = [text_lib.Text(tokenizer, prompt if cache.continues(model) else (), stops) for prompt in prompts]
  common = dict(max_tokens=max_tokens, ends=() if tokenizer.eos is None else (tokenizer.eos,))
  if beams > 1:
    stream = itertools.zip_longest(*beams_lib.search(model, variables, prompts, beams=beams, penalty=penalty, **common))
  else:
    stream = decode.stream(model, variables, prompts, key=key, settings=settings, first=first, **common)
  for tokens in stream:
    for text, token in zip(texts, tokens, strict=True):
      if token is not None and token != tokenizer.eos and not text.over:
        show(text.add(token))
    if all(text.over for text in texts):
      break
  for text in texts:
    show(text.finish())
  return [text.written for text in texts]

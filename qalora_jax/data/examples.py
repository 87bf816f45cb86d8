"""Documents as token ids with the mask that says which tokens are learnt or scored."""

import numpy as np

from qalora_jax import tokenizer as tokenizer_lib
from qalora_jax.data import records

# Arrays [n], the same ones in all examples of a set: tokens and loss_mask, int32, and what else an objective wants
# (`objectives.Objective.arrays`); `inputs` of a model with an encoder have a length of their own.  loss_mask is 1 where
# the token, as a target, carries loss: the model reads the tokens before it and is asked for it.  The first token is
# never a target.
Example = dict[str, np.ndarray]


def encode(
  document: records.Document,
  tokenizer: tokenizer_lib.Tokenizer,
  *,
  window: int,
  loss_on: str,
  append_eos: bool,
  overflow: str,
  max_prompt: int = 0,
  max_completion: int = 0,
) -> list[Example]:
  """The examples, of at most `window` tokens each, of one text or pair.

  Text: BOS, text, EOS; all but the first token carry loss.  A longer text is 'cut' at the window or 'split' into
  windows that overlap by one token, so that the last token of one, no target in the next, is what the next one's first
  target is conditioned on: every target is scored exactly once.

  Pair: BOS, prompt, completion, EOS; completion and EOS carry loss ('completion') or all but the first token ('all').
  Prompt and completion are tokenized apart, as the released QA-LoRA code does, because then the boundary between
  what is given and what is learnt never falls inside a token.  (A SentencePiece model that puts a space before every
  text does so before the completion too.)  A prompt is cut at its front, to `max_prompt` and to what the completion
  leaves free in the window; a completion with its EOS is cut at its end, to `max_completion` and to the window
  (0: no limit).  A pair is never split, whatever `overflow` says.

  A sentence with a label: `encode_labelled`.

  A tokenizer without BOS or EOS writes none.  Raises ValueError for an unknown choice, a window below 2, a negative
  limit, a question, and a document that leaves no target.
  """
  _check(window, loss_on, overflow, max_prompt, max_completion)
  eos = [tokenizer.eos] if append_eos and tokenizer.eos is not None else []
  match document:
    case records.Text(text):
      tokens = np.array([*_bos(tokenizer), *tokenizer.encode(text), *eos], np.int32)
      # A window starts one token before its first target; the last token starts none.
      starts = range(0, len(tokens) - 1, window - 1)
      pieces = [tokens[start : start + window] for start in starts]
      examples = [_example(piece, given=0) for piece in (pieces if overflow == 'split' else pieces[:1])]
    case records.Pair(prompt, completion):
      given = encode_prompt(prompt, tokenizer, max_prompt)
      completion_ids = (tokenizer.encode(completion) + eos)[: max_completion or None]
      bos = _bos(tokenizer)
      examples = [_join(bos, given[len(bos) :], completion_ids, window=window, loss_on=loss_on)]
    case records.Labelled():
      examples = [encode_labelled(document, tokenizer, window=window, cuts=overflow == 'cut')]
    case _:
      raise ValueError(
        f'{_name(document)} has choices to be scored, not learnt; train and validate on prompt and completion, or text'
      )
  if not examples or not any(example['loss_mask'].any() for example in examples):
    raise ValueError(f'{_name(document)} leaves no token that carries loss; drop it, or set append_eos')
  return examples


def encode_answer(
  document: records.Document,
  tokenizer: tokenizer_lib.Tokenizer,
  *,
  begin: int,
  window: int,
  loss_on: str,
  append_eos: bool,
  overflow: str,
  max_prompt: int = 0,
  max_completion: int = 0,
) -> list[Example]:
  """The one example of a pair, for a model whose encoder reads the prompt and whose decoder writes the completion.

  `inputs` are those of `encode_input`, of at most `window` tokens; `tokens` are `begin`, which carries no loss, the
  completion and EOS, cut at their end to `max_completion` (0: to the window, `begin` included).  Raises ValueError for
  a document that is no pair, for loss_on = 'all', whose prompts no decoder writes, and as `encode` does.
  """
  _check(window, loss_on, overflow, max_prompt, max_completion)
  if not isinstance(document, records.Pair):
    raise ValueError(f'{_name(document)} is no pair; a model with an encoder is taught with prompt and completion')
  if loss_on == 'all':
    raise ValueError("loss_on = 'all': an encoder reads the prompt, and nothing predicts it; use 'completion'")
  eos = [tokenizer.eos] if append_eos and tokenizer.eos is not None else []
  completion = (tokenizer.encode(document.completion) + eos)[: max_completion or window - 1]
  inputs = encode_input(document.prompt, tokenizer, min(max_prompt or window, window))
  if not completion:
    raise ValueError(f'{_name(document)} leaves no token that carries loss; drop it, or set append_eos')
  return [_example([begin, *completion], given=1) | {'inputs': np.asarray(inputs, np.int32)}]


def encode_input(prompt: str, tokenizer: tokenizer_lib.Tokenizer, max_prompt: int = 0) -> list[int]:
  """What an encoder reads: the prompt, cut at its end to `max_prompt` tokens with EOS (0: no limit), and EOS.

  At its end, as T5's are: what is asked stands at the front.  Raises ValueError where nothing is left.
  """
  eos = [] if tokenizer.eos is None else [tokenizer.eos]
  ids = tokenizer.encode(prompt)
  inputs = (ids[: max(max_prompt - len(eos), 0)] if max_prompt else ids) + eos
  if not inputs:
    raise ValueError(f'the prompt {prompt!r:.80} has no token, and this tokenizer no EOS')
  return inputs


def encode_labelled(
  document: records.Labelled, tokenizer: tokenizer_lib.Tokenizer, *, window: int, cuts: bool
) -> Example:
  """[CLS] first [SEP], or [CLS] first [SEP] second [SEP], with types; the label (float32) and loss_mask 1 at [CLS].

  What is longer than the window is cut (`tokenizer.Framed`) where it `cuts`, and a ValueError where not.  Raises
  ValueError for a tokenizer that does not frame sentences.
  """
  if tokenizer.framed is None:
    raise ValueError(
      f'{_name(document)} is a sentence with a label, which an encoder reads between [CLS] and [SEP]; the tokenizer '
      "has no such marks (the post_processor of a BERT's tokenizer.json): check model.source and model.tokenizer"
    )
  framed = tokenizer.framed(document.first, document.second, window)
  if framed.cut and not cuts:
    raise ValueError(
      f'{_name(document)} is {framed.cut} tokens longer than the window of {window}: raise it, or let it be cut '
      '(overflow = "cut")'
    )
  first = (np.arange(len(framed.ids)) == 0).astype(np.int32)
  return {
    'tokens': np.asarray(framed.ids, np.int32),
    'loss_mask': first,
    'types': np.asarray(framed.types, np.int32),
    'labels': first.astype(np.float32) * np.float32(document.label),
  }


def encode_prompt(prompt: str, tokenizer: tokenizer_lib.Tokenizer, max_prompt: int = 0) -> list[int]:
  """BOS and the prompt of a pair, cut at its front to `max_prompt` tokens (0: no limit): what a completion follows."""
  return _bos(tokenizer) + _last(tokenizer.encode(prompt), max_prompt or None)


def encode_question(question: records.Question, tokenizer: tokenizer_lib.Tokenizer, window: int) -> list[Example]:
  """One example per choice: BOS, prompt, choice, the choice carrying loss.

  All choices see the same prompt, cut at its front to what the longest choice leaves free in the window.

  Raises ValueError if the document is no question, or if the longest choice leaves no room for the prompt.
  """
  if not isinstance(question, records.Question):
    raise ValueError(f'{_name(question)} has no choices; multiple choice needs prompt, choices and answer')
  whole = tokenizer.encode(question.prompt)
  # Encoded with the prompt: SentencePiece would put a second space before a choice that begins with one.
  choices = [tokenizer.encode(question.prompt + choice)[len(whole) :] for choice in question.choices]
  room = window - len(_bos(tokenizer)) - max(map(len, choices))
  prompt = _last(whole, max(room, 0))
  if not all(choices) or not prompt:
    raise ValueError(
      f'{_name(question)}: choices of {[len(choice) for choice in choices]} tokens and the prompt '
      f'do not fit into window = {window}, or one of them is empty'
    )
  return [_join(_bos(tokenizer), prompt, choice, window=window, loss_on='completion') for choice in choices]


def _check(window: int, loss_on: str, overflow: str, max_prompt: int, max_completion: int) -> None:
  if window < 2:
    raise ValueError(f'window = {window} holds no target; it must be 2 or more')
  if loss_on not in ('completion', 'all'):
    raise ValueError(f'loss_on {loss_on!r} is unknown; choose completion or all')
  if overflow not in ('split', 'cut'):
    raise ValueError(f'overflow {overflow!r} is unknown; choose split or cut')
  for name, limit in (('max_prompt', max_prompt), ('max_completion', max_completion)):
    if limit < 0:
      raise ValueError(f'{name} = {limit} is negative; 0 means no limit')


def _bos(tokenizer: tokenizer_lib.Tokenizer) -> list[int]:
  return [] if tokenizer.bos is None else [tokenizer.bos]


def _last(ids: list[int], count: int | None) -> list[int]:
  return ids if count is None else ids[max(len(ids) - count, 0) :]


def _join(bos: list[int], prompt: list[int], completion: list[int], *, window: int, loss_on: str) -> Example:
  given = bos + _last(prompt, max(window - len(bos) - len(completion), 0))
  return _example((given + completion)[:window], given=len(given) if loss_on == 'completion' else 0)


def _example(tokens, *, given: int) -> Example:
  tokens = np.asarray(tokens, np.int32)
  # Whatever is given, the first token of a window has nothing to be conditioned on.
  loss_mask = (np.arange(len(tokens)) >= max(given, 1)).astype(np.int32)
  return {'tokens': tokens, 'loss_mask': loss_mask}


def _name(document: records.Document) -> str:
  shown = repr(document)
  return shown if len(shown) <= 120 else f'{shown[:120]}...'

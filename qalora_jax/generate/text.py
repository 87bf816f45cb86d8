"""Tokens to text as it comes: whole letters, and nothing of a stop string."""

from collections.abc import Sequence

from qalora_jax import tokenizer as tokenizer_lib

# What a decoder writes for bytes that are no letter, or not one yet.
_BROKEN = '\ufffd'
# Tokens before a new one that its spelling can depend on; tokens that a letter of several bytes can take.
_SIGHT, _LONGEST = 4, 4


class Text:
  """The text that continues `prompt`, token by token.

  `written` holds all that was shown; `over` is set when one of `stops` appears: the text ends before it.
  """

  def __init__(self, tokenizer: tokenizer_lib.Tokenizer, prompt: Sequence[int], stops: Sequence[str] = ()):
    self.written, self.over = '', False
    self._decode, self._stops = tokenizer.decode, [stop for stop in stops if stop]
    # Decoded with a few tokens before it, not with all: that would cost the square of the length.
    self._before, self._new = list(prompt[-_SIGHT:]), []
    self._held = ''

  def add(self, token: int) -> str:
    """What can be shown once `token` is there: no half letter, and nothing that may yet become a stop string."""
    self._new.append(token)
    text = self._spelled()
    if text.endswith(_BROKEN) and len(self._new) < _LONGEST:
      return ''
    self._before, self._new = [*self._before, *self._new][-_SIGHT:], []
    return self._show(self._held + text)

  def finish(self) -> str:
    """What was held back and is shown after all, the text being over."""
    if self.over:
      return ''
    shown = self._show(self._held + self._spelled())
    if not self.over:
      # Nothing follows that could make a stop string of it.
      self.written, shown = self.written + self._held, shown + self._held
    self._held, self._new = '', []
    return shown

  def _spelled(self) -> str:
    return self._decode([*self._before, *self._new])[len(self._decode(self._before)) :]

  def _show(self, text: str) -> str:
    found = [at for at in map(text.find, self._stops) if at >= 0]
    if found:
      self.over, self._held = True, ''
      shown = text[: min(found)]
    else:
      shown = text[: len(text) - max((_beginning(text, stop) for stop in self._stops), default=0)]
      self._held = text[len(shown) :]
    self.written += shown
    return shown


def _beginning(text: str, stop: str) -> int:
  """The length of the longest end of `text` that begins `stop`."""
  return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)

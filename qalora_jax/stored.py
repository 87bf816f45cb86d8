"""Directories whose weights are quantized already, whatever their form."""

import pathlib
import types

from qalora_jax import gptq_files
from qalora_jax import packed

# Each has holds(directory), describe(directory) and load(directory, config, scheme, progress=, place=).
FORMS = (packed, gptq_files)


def form(directory) -> types.ModuleType | None:
  """The module that reads the quantized weights of `directory`; None where they are dense."""
  return next((module for module in FORMS if module.holds(pathlib.Path(directory))), None)


def check_beginning(directory, choices: dict | None) -> None:
  """ValueError where an adapter of `choices` (None: beginning at zero) cannot begin on the quantized `directory`."""
  if form(directory) is packed:
    packed.check_beginning(directory, choices)
  elif choices is not None:
    raise ValueError(
      f'{directory} holds no adapter to begin with, and adapter.init = {choices["init"]!r} asks for one: set '
      'adapter.init = "zero", or quantize a dense source.'
    )


def is_quantized(directory) -> bool:
  """Whether the weights of `directory` are codes."""
  return form(directory) is not None

"""Model families: what Hugging Face's config.json says of each, and what its tensors are called.

A family is a room: a module here that reads and writes its config and names its tensors, and the linen module that
computes it in `models`.  Everything else asks `find` and `of`.
"""

from qalora_jax import objectives
from qalora_jax.families import bert
from qalora_jax.families import gemma
from qalora_jax.families import gpt2
from qalora_jax.families import llama
from qalora_jax.families import mistral
from qalora_jax.families import phi
from qalora_jax.families import qwen
from qalora_jax.families import t5
from qalora_jax.families.family import Family
from qalora_jax.families.family import Headed
from qalora_jax.families.family import View

__all__ = ['FAMILIES', 'Family', 'Headed', 'View', 'find', 'objective', 'of']

_DECODERS = (llama.LLAMA, mistral.MISTRAL, qwen.QWEN2, qwen.QWEN3, gemma.GEMMA2, gemma.GEMMA3, phi.PHI3, gpt2.GPT2)
FAMILIES = {family.model_type: family for family in (*_DECODERS, bert.BERT, t5.T5)}
# What holds a model of a family beside another model; only read.
_AROUND = {family.model_type: family for family in (gemma.GEMMA3_BESIDE_VISION,)}


def find(model_type) -> Family:
  """The family of a config.json's model_type; ValueError with the known ones for another."""
  known = FAMILIES | _AROUND
  if model_type not in tuple(known):
    raise ValueError(f'model_type is {model_type!r}; supported: {", ".join(known)}.')
  return known[model_type]


def of(config) -> Family:
  """The family of a model's config."""
  return FAMILIES[config.family]


def objective(config) -> objectives.Objective:
  """What training makes small of a model with this config."""
  return of(config).objective(config)

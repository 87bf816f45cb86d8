"""Model families: what Hugging Face's config.json says of each, and what its tensors are called.

A family is a room: a module here that reads and writes its config and names its tensors, and the linen module that
computes it in `models`.  Everything else asks `find` and `of`.
"""

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

__all__ = ['FAMILIES', 'Family', 'Headed', 'View', 'find', 'of']

_DECODERS = (llama.LLAMA, mistral.MISTRAL, qwen.QWEN2, qwen.QWEN3, gemma.GEMMA2, gemma.GEMMA3, phi.PHI3, gpt2.GPT2)
FAMILIES = {family.model_type: family for family in (*_DECODERS, bert.BERT, t5.T5)}
# What some that look supported are.
_OTHERS = {
  'gemma3': 'a text model beside a vision tower; save the text model alone, as "gemma3_text" (transformers: '
  'Gemma3ForCausalLM.from_pretrained(...).save_pretrained(...))',
}


def find(model_type) -> Family:
  """The family of a config.json's model_type; ValueError with the known ones for another."""
  if model_type in _OTHERS:
    raise ValueError(f'model_type is {model_type!r}, {_OTHERS[model_type]}.')
  if model_type not in FAMILIES:
    raise ValueError(f'model_type is {model_type!r}; supported: {", ".join(FAMILIES)}.')
  return FAMILIES[model_type]


def of(config) -> Family:
  """The family of a model's config."""
  return FAMILIES[config.family]

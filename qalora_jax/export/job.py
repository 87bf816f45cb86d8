"""What every format is given."""

import dataclasses
import pathlib

from qalora_jax.models import layers


@dataclasses.dataclass(frozen=True)
class Job:
  """A model to be written.

  tree: its weights, quantized and dense, merged.  dtype: what dense weights are stored in.  widen: a quantized matrix
  that the format cannot hold is written dense.  lossy: one that it can hold only by rounding is rounded.
  tokenizer_from: a directory whose tokenizer goes along; bos and eos: its ids.  provenance: where the model comes from.
  """

  config: layers.Config
  tree: dict
  dtype: str = 'float32'
  widen: bool = False
  lossy: bool = False
  tokenizer_from: pathlib.Path | None = None
  bos: int | None = None
  eos: int | None = None
  provenance: dict = dataclasses.field(default_factory=dict)

  @property
  def tokenizer(self) -> dict:
    """What says which tokenizer goes along, as `hf.publish` takes it."""
    return dict(tokenizer_from=self.tokenizer_from, bos=self.bos, eos=self.eos)

"""What config.json says of rotary positions."""

from collections.abc import Mapping
import dataclasses

from qalora_jax.models import rotary


def read(raw: Mapping) -> tuple[float, rotary.Stretch | rotary.Interpolation | None]:
  """Theta and the scaling; transformers 5 keeps both in `rope_parameters`, earlier ones apart.

  ValueError for a scaling that is not known, or says too little.
  """
  newer = raw.get('rope_parameters') or {}
  theta = float(newer.get('rope_theta', raw.get('rope_theta', 10000.0)))
  return theta, scaling(newer or raw.get('rope_scaling') or {})


def scaling(said: Mapping) -> rotary.Stretch | rotary.Interpolation | None:
  """The scaling that a dict of config.json describes."""
  kind = said.get('rope_type', said.get('type', 'default'))
  if kind == 'default':
    return None
  if kind not in rotary.SCALINGS:
    raise ValueError(f'RoPE is scaled as {kind!r}; supported: default, {", ".join(rotary.SCALINGS)}.')
  fields = [field.name for field in dataclasses.fields(rotary.SCALINGS[kind])]
  if missing := [name for name in fields if name not in said]:
    raise ValueError(f'RoPE scaling "{kind}" has no {", ".join(missing)}.')
  return rotary.SCALINGS[kind](**{name: said[name] for name in fields})


def said(scaling: rotary.Stretch | rotary.Interpolation | None) -> dict | None:
  """What config.json says of a scaling; the inverse of `scaling`."""
  if scaling is None:
    return None
  (kind,) = [kind for kind, made in rotary.SCALINGS.items() if isinstance(scaling, made)]
  return {'rope_type': kind, **dataclasses.asdict(scaling)}

"""What config.json says of rotary positions."""

from collections.abc import Mapping
import dataclasses

from qalora_jax.models import decoder
from qalora_jax.models import rotary

Scaling = rotary.Stretch | rotary.Interpolation | None


def read(raw: Mapping) -> tuple[float, Scaling]:
  """Theta and the scaling; transformers 5 keeps both in `rope_parameters`, earlier ones apart.

  ValueError for a scaling that is not known, or says too little, for rotations of a part of a head, and for more than
  one scaling.
  """
  newer = raw.get('rope_parameters') or {}
  if kinds := [key for key in newer if key in decoder.KINDS]:
    raise ValueError(f'rope_parameters differ by layer ({", ".join(kinds)}); this model_type has one for all.')
  _check_whole(raw)
  theta = float(newer.get('rope_theta', raw.get('rope_theta', 10000.0)))
  return theta, scaling(newer or raw.get('rope_scaling') or {})


def read_by_kind(raw: Mapping, whole: float, local: float) -> tuple[tuple[float, Scaling], tuple[float, Scaling]]:
  """(theta, scaling) of layers that see everything and of those that see a window; `whole`, `local`: unless said.

  transformers 5 keeps them in `rope_parameters` by kind, earlier ones in rope_theta and rope_scaling, of the former
  alone, and rope_local_base_freq.  ValueError as `read`.
  """
  newer = raw.get('rope_parameters') or {}
  if newer and not set(newer) & set(decoder.KINDS):
    raise ValueError(f'rope_parameters has none of {", ".join(decoder.KINDS)}, and this model_type turns by kind.')
  _check_whole(raw)
  found = []
  older = {decoder.FULL: raw.get('rope_scaling') or {}, decoder.SLIDING: {}}
  thetas = {decoder.FULL: ('rope_theta', whole), decoder.SLIDING: ('rope_local_base_freq', local)}
  for kind, (key, default) in thetas.items():
    own = newer.get(kind) or older[kind]
    _check_whole(own)
    found.append((float(own.get('rope_theta', raw.get(key, default))), scaling(own)))
  return tuple(found)


def _check_whole(said: Mapping) -> None:
  for one in (said, said.get('rope_parameters') or {}, said.get('rope_scaling') or {}):
    if (one.get('partial_rotary_factor') or 1.0) != 1.0:
      raise ValueError(f'partial_rotary_factor = {one["partial_rotary_factor"]!r}; only 1.0 is supported.')


def scaling(said: Mapping) -> Scaling:
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


def said(scaling: Scaling) -> dict | None:
  """What config.json says of a scaling; the inverse of `scaling`."""
  if scaling is None:
    return None
  (kind,) = [kind for kind, made in rotary.SCALINGS.items() if isinstance(scaling, made)]
  return {'rope_type': kind, **dataclasses.asdict(scaling)}

"""What config.json says of rotary positions."""

from collections.abc import Mapping
import dataclasses

from qalora_jax.families import family
from qalora_jax.models import decoder
from qalora_jax.models import rotary

Scaling = rotary.Stretch | rotary.Interpolation | None


def read(raw: Mapping) -> tuple[float, Scaling]:
  """Theta and the scaling; transformers 5 keeps both in `rope_parameters`, earlier ones apart.

  ValueError for a scaling that is not known, or says too little, for rotations of a part of a head, and for more than
  one scaling.
  """
  newer, older = _said(raw, 'rope_parameters'), _said(raw, 'rope_scaling')
  if kinds := [key for key in newer if key in decoder.KINDS]:
    raise ValueError(f'rope_parameters differ by layer ({", ".join(kinds)}); this model_type has one for all.')
  _check_whole(raw)
  _check_alike(newer, older)
  own = newer or older
  return _theta(raw, 'rope_theta', own, 10000.0, strict=own is older), scaling(own)


def read_by_kind(raw: Mapping, whole: float, local: float) -> tuple[tuple[float, Scaling], tuple[float, Scaling]]:
  """(theta, scaling) of layers that see everything and of those that see a window; `whole`, `local`: unless said.

  transformers 5 keeps them in `rope_parameters` by kind, earlier ones in rope_theta and rope_scaling, of the former
  alone, and rope_local_base_freq.  ValueError as `read`.
  """
  newer = _said(raw, 'rope_parameters')
  if newer and not set(newer) & set(decoder.KINDS):
    raise ValueError(f'rope_parameters has none of {", ".join(decoder.KINDS)}, and this model_type turns by kind.')
  _check_whole(raw)
  found = []
  older = {decoder.FULL: _said(raw, 'rope_scaling'), decoder.SLIDING: {}}
  thetas = {decoder.FULL: ('rope_theta', whole), decoder.SLIDING: ('rope_local_base_freq', local)}
  for kind, (key, default) in thetas.items():
    _check_alike(_said(newer, kind), older[kind])
    own = _said(newer, kind) or older[kind]
    _check_whole(own)
    found.append((_theta(raw, key, own, default, strict=own is older[kind]), scaling(own)))
  return tuple(found)


def _said(raw: Mapping, key: str) -> Mapping:
  """What config.json says under a key, {} for nothing."""
  value = raw.get(key) or {}
  if not isinstance(value, Mapping):
    raise ValueError(f'{key} = {value!r}; it is an object, as {{"rope_type": "linear", "factor": 2.0}}.')
  return value


def _theta(raw: Mapping, key: str, own: Mapping, default: float, strict: bool) -> float:
  """The theta of one kind of layers: what `own` says, else what `raw` says under `key`.

  ValueError where both do and differ, if `strict`: transformers 5 takes the former, earlier ones took the latter.
  """
  if strict and None not in (own.get('rope_theta'), raw.get(key)) and own['rope_theta'] != raw[key]:
    raise ValueError(f'rope_scaling says rope_theta = {own["rope_theta"]!r}, and {key} = {raw[key]!r}: leave one away.')
  return family.number(own, 'rope_theta', family.number(raw, key, default))


def _check_alike(newer: Mapping, older: Mapping) -> None:
  """ValueError where both are there and scale otherwise: transformers lets rope_scaling take the other's place."""
  if newer and older and scaling(newer) != scaling(older):
    raise ValueError('rope_parameters and rope_scaling say different things; say all in rope_parameters.')


def _check_whole(said: Mapping) -> None:
  for one in (said, _said(said, 'rope_parameters'), _said(said, 'rope_scaling')):
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
  if missing := [name for name in fields if said.get(name) is None]:
    raise ValueError(f'RoPE scaling "{kind}" has no {", ".join(missing)}.')
  for name in fields:
    family.number(said, name, 1.0)
  return rotary.SCALINGS[kind](**{name: said[name] for name in fields})


def said(scaling: Scaling) -> dict | None:
  """What config.json says of a scaling; the inverse of `scaling`."""
  if scaling is None:
    return None
  (kind,) = [kind for kind, made in rotary.SCALINGS.items() if isinstance(scaling, made)]
  return {'rope_type': kind, **dataclasses.asdict(scaling)}

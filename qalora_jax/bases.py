"""From config.base and config.adapter to what stands where: quantizers, adapters, the scheme of a model."""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses

import jax.numpy as jnp
import ml_collections

from qalora_jax import adapters
from qalora_jax import config as config_lib
from qalora_jax import families
from qalora_jax import packed
from qalora_jax import rules
from qalora_jax.models import linear
from qalora_jax.quant import affine
from qalora_jax.quant import codebooks
from qalora_jax.quant import float4
from qalora_jax.quant import gptq
from qalora_jax.quant import method as method_lib

_BEGINNING = ('kind', 'rank', 'alpha', 'pool', 'targets', 'init', 'init_iterations')


def scheme(
  config: ml_collections.ConfigDict, directory=None, stored: dict | None = None, headed: families.Headed | None = None
) -> linear.Scheme:
  """What stands where at birth.

  `stored`: {weight: form} of the already quantized source in `directory`; `headed`: the head beside it.
  """
  chosen = config.adapter
  if stored is not None:
    _check_stored(config.base, stored, directory)
  if chosen.kind == 'full' and stored:
    raise ValueError(
      f'adapter.kind = "full" trains every weight, but those of {config.model.source} are codes; '
      'use "qalora" or "lora", or a dense model.source.'
    )
  own = adapter(chosen) if chosen.kind in adapters.KINDS else None
  choices = dict(adapter=own, adapted=chosen.targets, frozen_dtype=jnp.dtype(config.model.frozen_dtype))
  if headed is not None:
    choices['heads'] = _heads(chosen.kind, headed, config.model.source)
  if stored is not None:
    return packed.scheme_of(stored, **choices)
  return linear.Scheme(trains=chosen.kind == 'full', quantizers=quantizers(config.base), **choices)


def _heads(kind: str, headed: families.Headed, source: str) -> tuple[str, ...]:
  """The modules that are not read with the weights: of those that train, what the weights do not train with them."""
  if kind == 'head' and not headed.trains:
    raise ValueError(
      'adapter.kind = "head" trains a classifier alone, and this model has none: set model.labels (of a BERT), or use '
      '"lora", "qalora" or "full".'
    )
  if kind == 'none' and headed.drawn:
    raise ValueError(undrawn(source, headed.drawn, headed.config.labels))
  return {'none': (), 'full': headed.drawn}.get(kind, headed.trains)


def undrawn(source, drawn: Sequence[str], labels: int) -> str:
  """What is said of a head that would be drawn where nothing trains."""
  return (
    f'{source} does not hold the {" and the ".join(drawn)} of model.labels = {labels}: train them (adapter.kind = '
    '"head", "lora", "qalora" or "full"), or name a model that has them.'
  )


def adapter(chosen) -> adapters.Adapter:
  """The adapter that config.adapter (or a dict of its keys) describes."""
  return adapters.Adapter(**{key: chosen[key] for key in ('kind', 'rank', 'alpha', 'dropout', 'pool')})


def quantizers(base: ml_collections.ConfigDict) -> tuple[tuple[str, Callable | None], ...]:
  """(pattern, method) of every rule of the config's base, then of its targets; none where it leaves weights stored."""
  if base.method == 'stored':
    return ()
  flat = rules.flatten(base)
  exceptions = [(pattern, method(flat | settings)) for pattern, settings in rules.parse(base.rules, flat)]
  return (*exceptions, (base.targets, method(flat)))


def method(flat: dict) -> method_lib.Method | method_lib.QAT | None:
  """How one weight is quantized; `flat` is config.base flattened, for this weight.  None: it stays dense."""
  kind = flat['method']
  if kind == 'dense':
    return None
  if kind in codebooks.CODEBOOKS:
    keys = ('group', 'double', 'scale_dtype')
    quantizer = float4.Float4(kind=kind, **{key: flat[key] for key in keys})
  else:
    quantizer = affine.Affine(**{field.name: flat[field.name] for field in dataclasses.fields(affine.Affine)})
  if kind == 'qat':
    return method_lib.QAT(quantizer, learned=flat['scales'] == 'learned')
  options = None
  if kind == 'gptq':
    options = gptq.GPTQ(**{field.name: flat[f'gptq.{field.name}'] for field in dataclasses.fields(gptq.GPTQ)})
  return method_lib.Method(quantizer, options, flat['refine_damping'] if flat['refine'] else None)


def needs_quantize(config: ml_collections.ConfigDict) -> bool:
  """Whether the config's base takes more than reading and rounding each weight: `qalora quantize` makes it."""
  needs = [getattr(method, 'calibrated', False) for _, method in quantizers(config.base)]
  chooses = config.base.budget and config.base.method != 'stored'
  return any(needs) or bool(chooses) or config.adapter.init != 'zero'


def looks_at_activations(config: ml_collections.ConfigDict) -> str:
  """What of the config's base or adapter needs calibration; '' for none."""
  if config.base.method != 'stored' and config.base.budget:
    return f'base.budget = {config.base.budget}'
  if any(getattr(method, 'calibrated', False) for _, method in quantizers(config.base)):
    return f'base.method = {config.base.method!r} with refine = {config.base.refine}, rules = {config.base.rules!r}'
  return 'adapter.init = "calibrated"' if config.adapter.init == 'calibrated' else ''


def settings(config: ml_collections.ConfigDict) -> dict:
  """All that decides what `qalora quantize` makes of the config."""
  model = {key: config.model[key] for key in ('source', 'revision', 'dtype', 'frozen_dtype')}
  parts = {key: config[key].to_dict() for key in ('base', 'calibration')}
  return {'model': model, **parts, 'adapter': beginning(config), 'seed': config.seed}


def beginning(config: ml_collections.ConfigDict) -> dict | None:
  """What says how adapters begin that do not begin at zero; None where they do."""
  chosen = config.adapter.to_dict()
  return None if chosen['init'] == 'zero' else {key: chosen[key] for key in _BEGINNING}


def patterns(base) -> list[tuple[str, bool]]:
  """(pattern, whether it is base.targets) of all that says where quantizers act."""
  patterns = [pattern for pattern, _ in quantizers(base)]
  return [(pattern, index == len(patterns) - 1) for index, pattern in enumerate(patterns)]


def _check_stored(base, stored: dict, directory) -> None:
  """ValueError where the config asks for another quantization than the directory holds; 'stored' asks for none."""
  if base.method == 'stored':
    return
  made = packed.manifest(directory)['provenance'].get('base') if packed.holds(directory) else None
  found = sorted({(form.bits, form.group, form.levels) for form in stored.values()})
  levels = base.method if base.method in codebooks.CODEBOOKS else 'integer'
  same = base.to_dict() == made if made else found == [(base.bits, base.group, levels)]
  if not same:
    changed = config_lib.differences(made, base) if made else [f'(bits, group, levels) = {found}']
    raise ValueError(
      f'{directory} is already quantized, otherwise than the config asks for: {"; ".join(changed)}. '
      'Set base.method = "stored" to take it as it is, or quantize a dense source.'
    )

"""Adapters as PEFT's directories hold them: adapter_config.json and adapter_model.safetensors, written and read.

A projection has lora_A [R, I] and lora_B [O, R].  Of QA-LoRA, lora_A is [R, L] on inputs averaged over each of the
L = I / G groups, and two conventions exist for what stands before it:

    released   y += alpha / R * mean(x) @ A.T @ B.T              the released code's; use_qalora is not set
    peft       y += alpha / R * L * mean(x) @ A.T @ B.T          PEFT's use_qalora, on GPTQ bases

This package sums or averages (`adapters.qalora`), so B is rescaled: by G where it sums, and by 1 / L for PEFT.
"""

import math
import pathlib
import re

import jax
import numpy as np

from qalora_jax import families
from qalora_jax import layout
from qalora_jax import tensors
from qalora_jax.adapters import lora
from qalora_jax.adapters import qalora
from qalora_jax.models import layers
from qalora_jax.models import linear

CONFIG, WEIGHTS = 'adapter_config.json', 'adapter_model.safetensors'
CONVENTIONS = ('peft', 'released')
_PREFIX = 'base_model.model.'
# What an adapter may say only in one way here; absent, it means the same.
_FIXED = {
  'peft_type': 'LORA',
  'bias': 'none',
  'use_dora': False,
  'fan_in_fan_out': False,
  'modules_to_save': None,
  'rank_pattern': {},
  'alpha_pattern': {},
  'layer_replication': None,
  'trainable_token_indices': None,
  'target_parameters': None,
  'lora_bias': False,
}


def is_adapter(directory) -> bool:
  """Whether `directory` holds an adapter in PEFT's form."""
  return (pathlib.Path(directory) / CONFIG).is_file()


def write(directory, config: layers.Config, params: dict, *, base: str, convention: str = 'peft') -> None:
  """Writes the adapters of `params` as a directory that appears whole; `base` names the model that they belong to.

  Raises ValueError for params without adapters, and for QA-LoRA on groups of several sizes under PEFT's convention,
  which has one size for all.
  """
  _check_family(config)
  found = list(_adapters(config, params))
  if not found:
    raise ValueError('there is no adapter to write: the run trained every weight, or none; use --format=hf.')
  _, _, first = found[0]
  groups = {inputs // node.a.shape[-2] for _, inputs, node in found}
  is_qalora = isinstance(first, qalora.QALoRA)
  if is_qalora and convention == 'peft' and len(groups) > 1:
    raise ValueError(
      f'QA-LoRA on groups of {", ".join(map(str, sorted(groups)))}: PEFT has one qalora_group_size for all; leave some '
      'out by adapter.targets, or write --convention=released.'
    )
  rank, alpha = first.a.shape[-1], first.alpha
  if len({(node.a.shape[-1], node.alpha) for _, _, node in found}) > 1:
    # A sum of adapters has ranks that differ; PEFT's file has one: the largest, with the scaling in B.
    rank = alpha = max(node.a.shape[-1] for _, _, node in found)
  modules = [module for module, _, _ in found]
  stated = {
    'base_model_name_or_path': base,
    'peft_type': 'LORA',
    'task_type': families.of(config).task_type,
    'r': rank,
    'lora_alpha': alpha,
    'lora_dropout': first.dropout,
    'bias': 'none',
    'inference_mode': True,
    'target_modules': _targets(config, modules),
  }
  if is_qalora and convention == 'peft':
    stated |= {'use_qalora': True, 'qalora_group_size': groups.pop()}
  named = {}
  for module, inputs, node in found:
    factor = (node.alpha / node.a.shape[-1]) / (alpha / rank)
    if is_qalora:
      factor *= _factor(node, inputs, convention)
    more = rank - node.a.shape[-1]
    named[f'{_PREFIX}{module}.lora_A.weight'] = np.pad(np.asarray(node.a), [(0, 0), (0, more)]).T
    named[f'{_PREFIX}{module}.lora_B.weight'] = np.pad(np.asarray(node.b) * np.float32(factor), [(0, more), (0, 0)]).T
  with tensors.fresh(directory) as temporary:
    tensors.write_json(temporary / CONFIG, stated)
    tensors.save_file(temporary / WEIGHTS, named)


def describe(directory, config: layers.Config) -> dict:
  """The choices of config.adapter that the adapter in `directory` was made with: kind, rank, alpha, targets, ...

  Raises FileNotFoundError where it is incomplete, ValueError naming what this package cannot express.
  """
  _check_family(config)
  stated, shapes, sizes = _stated(directory), _shapes(directory), _sizes(config)
  kind, pools = 'lora', {}
  for module, (rank, inputs) in shapes.items():
    if module not in sizes:
      raise ValueError(f'{directory}: adapts {module}, which is no projection of the model.')
    full = sizes[module]
    if rank != stated['r']:
      raise ValueError(f'{directory}: {module} has rank {rank}, {CONFIG} says r = {stated["r"]}.')
    pools[module] = inputs != full
    if full % inputs:
      raise ValueError(f"{directory}: {module}.lora_A has {inputs} inputs, which do not divide the model's {full}.")
  if any(pools.values()) or stated.get('use_qalora'):
    if not all(pools.values()):
      raise ValueError(f'{directory}: {next(m for m in pools if not pools[m])} is not pooled, though others are.')
    kind = 'qalora'
  alpha = float(stated['lora_alpha'])
  if stated.get('use_rslora'):
    alpha *= math.sqrt(stated['r'])
  return {
    'kind': kind,
    'rank': stated['r'],
    'alpha': alpha,
    'dropout': float(stated.get('lora_dropout', 0.0)),
    'pool': 'mean',
    'targets': _pattern(config, shapes),
  }


def load(directory, config: layers.Config, blank: dict) -> dict:
  """The adapters in `directory`, on the host, in the structure of the abstract params `blank` (a model that `describe`
  configured).  Raises ValueError where they do not fit its base.
  """
  stated, file = _stated(directory), pathlib.Path(directory) / WEIGHTS
  found = tensors.load_file(file)
  flat, weights = {}, {name: weight for weight, name in layout.weights(config).items()}
  for module, inputs, node in _adapters(config, blank):
    a = found.get(f'{_PREFIX}{module}.lora_A.weight')
    b = found.get(f'{_PREFIX}{module}.lora_B.weight')
    if a is None or b is None:
      raise ValueError(f'{file}: {module} has no lora_A or no lora_B.')
    a, b = a.T.astype(np.float32), b.T.astype(np.float32)
    if a.shape != node.a.shape or b.shape != node.b.shape:
      raise ValueError(
        f'{file}: {module} is {a.shape} x {b.shape}, and the base has place for {node.a.shape} x {node.b.shape}; '
        'QA-LoRA needs the groups that it was trained on.'
      )
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
      raise ValueError(f'{file}: {module} holds NaN or infinite entries.')
    if isinstance(node, qalora.QALoRA):
      convention = 'peft' if stated.get('use_qalora') else 'released'
      b = b / np.float32(_factor(node, inputs, convention))
    flat |= {f'{weights[module]}/adapter/a': a, f'{weights[module]}/adapter/b': b}
  stacked = lambda path, leaf: np.stack([flat[name] for name in layout.layer_names(path, leaf)])
  return jax.tree.map_with_path(stacked, blank)


def _check_family(config: layers.Config) -> None:
  """ValueError for a family some of whose projections are no modules of their own where PEFT looks for them."""
  if fused := families.of(config).views(config):
    name = layout.module(next(iter(fused)).format(0))
    raise ValueError(
      f'model_type {config.family!r}: {name} is no module in transformers, which holds several projections in one or '
      'turns them round, and PEFT adapts modules; keep the adapter in its workdir, or merge it by `qalora export`.'
    )


def _factor(node: qalora.QALoRA, inputs: int, convention: str) -> float:
  """What this package's B is multiplied by in a convention."""
  groups = node.a.shape[-2]
  by_pool = inputs // groups if node.pool == 'sum' else 1
  return by_pool / groups if convention == 'peft' else by_pool


def _adapters(config: layers.Config, params: dict):
  """(module, inputs, adapter of that layer alone) of every adapter of `params`, which may be abstract."""
  sizes, names = _sizes(config), layout.weights(config)
  is_leaf = lambda node: isinstance(node, lora.LoRA | qalora.QALoRA)
  for path, node in jax.tree.leaves_with_path(params, is_leaf=is_leaf):
    if not is_leaf(node):
      continue
    for at, name in enumerate(layout.layer_names(path, node.a)):
      module = names[name.removesuffix('/adapter')]
      yield module, sizes[module], jax.tree.map(lambda leaf, at=at: _at(leaf, at), node)


def _at(leaf, at: int):
  return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf[at]


def _targets(config: layers.Config, modules: list[str]) -> list[str]:
  """target_modules: the last names where all that bear them are adapted, else every module in full."""
  last = sorted({module.rpartition('.')[2] for module in modules})
  bearing = [module for module in _sizes(config) if module.rpartition('.')[2] in last]
  return last if len(modules) == len(bearing) else sorted(modules)


def _pattern(config: layers.Config, modules) -> str:
  """adapter.targets that select exactly these modules."""
  named = {name: weight for weight, name in layout.weights(config).items()}
  chosen = [named[module] for module in modules]
  last = sorted({weight.rpartition('/')[2] for weight in chosen})
  bearing = [weight for weight in named.values() if linear.selects(f'/({"|".join(last)})$', weight)]
  if len(chosen) == len(bearing):
    return f'/({"|".join(last)})$'
  return f'^({"|".join(sorted(chosen))})$'


def _sizes(config: layers.Config) -> dict[str, int]:
  """{module: its inputs} of every projection of the blocks."""
  shapes, sizes = layout.matrix_shapes(config), {}
  for weight, name in layout.weights(config).items():
    stack, _, rest = weight.partition('/')
    if linear.stack_of(stack):
      sizes[name] = shapes[f'{stack}/{rest.partition("/")[2]}/kernel'][0]
  return sizes


def _stated(directory) -> dict:
  file = pathlib.Path(directory) / CONFIG
  if not file.is_file():
    raise FileNotFoundError(f'{directory} has no {CONFIG}; an adapter of PEFT is {CONFIG} and {WEIGHTS}.')
  stated = tensors.read_json(file)
  for key, value in _FIXED.items():
    if (stated.get(key) or value) != value:
      raise ValueError(f'{file}: {key} = {stated[key]!r}; only {value!r} is supported.')
  for key, kind in (('r', int), ('lora_alpha', int | float)):
    if not isinstance(stated.get(key), kind) or stated[key] <= 0:
      raise ValueError(f'{file}: {key} = {stated.get(key)!r}; it is a number above 0.')
  return stated


def _shapes(directory) -> dict[str, tuple[int, int]]:
  """{module: (rank, inputs)} of every lora_A; ValueError for any tensor that is neither lora_A nor lora_B."""
  file = pathlib.Path(directory) / WEIGHTS
  if not file.is_file():
    raise FileNotFoundError(f'{directory} has no {WEIGHTS}; a pickled adapter_model.bin is not read.')
  found = {}
  for name, header in tensors.headers_of(file).items():
    match = re.fullmatch(rf'{re.escape(_PREFIX)}(.+)\.lora_([AB])\.weight', name)
    if match is None:
      raise ValueError(f'{file}: {name} is no weight of a LoRA or QA-LoRA adapter.')
    if match[2] == 'A':
      found[match[1]] = header.shape
  if not found:
    raise ValueError(f'{file}: holds no adapter.')
  return found

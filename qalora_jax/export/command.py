"""`qalora export`: merges a run, proves the merge, writes it in a format that others load, and reads it back."""

import pathlib

from flax import linen as nn
import jax.numpy as jnp

from qalora_jax import adapted
from qalora_jax import adapters
from qalora_jax import build
from qalora_jax import config as config_lib
from qalora_jax import hosts
from qalora_jax import peft
from qalora_jax import progress
from qalora_jax import quant
from qalora_jax import tensors
from qalora_jax.adapters import several
from qalora_jax.export import dense
from qalora_jax.export import gguf
from qalora_jax.export import gptq
from qalora_jax.export import job as job_lib
from qalora_jax.export import merge
from qalora_jax.export import mlx
from qalora_jax.export import own

# Modules of one shape: DTYPES, check(job), write(directory, job, progress), verify(directory, job, progress).
FORMATS = {'qalora': own, 'hf': dense, 'mlx': mlx, 'gguf': gguf, 'hf-gptq': gptq}
_NAMES = (*FORMATS, 'peft')
_OWN_FLAGS = {'dense': 'gguf', 'allow_lossy': 'hf-gptq'}
SUMMARY = (
  'Merges the run in --workdir (or takes --model) and writes it to --output.\n'
  '--format=qalora: still quantized, loads again here.  --format=mlx: still quantized, for mlx_lm.\n'
  '--format=gguf: 4 bits, for llama.cpp.  --format=hf: dense, any Hugging Face program loads it.\n'
  '--format=hf-gptq: still quantized, where offsets are integer zero-points.\n'
  '--format=peft: the adapter alone, not merged.  --adapters: a sum of several, merged.\n'
  'A merge whose logits differ from the adapted model by more than rounding is not written, nor is a directory that\n'
  'is not read back as it was.  What QAT trained is written in the codes that it was trained with.'
)


def main(argv=None) -> None:
  """Runs the command with `argv`."""
  flags = (
    config_lib.Flag('model', 'string', '', 'A workdir or model directory other than --workdir.'),
    adapted.FLAG,
    config_lib.Flag('format', 'string', 'qalora', f'One of {", ".join(_NAMES)}.'),
    config_lib.Flag('output', 'string', '', 'Directory to write (default: WORKDIR/export_FORMAT).'),
    config_lib.Flag('dtype', 'string', 'float32', 'Of what is dense: float32, bfloat16, float16, or q8_0 (gguf).'),
    config_lib.Flag('dense', 'bool', False, 'gguf: write matrices that it cannot hold in their bits dense.'),
    config_lib.Flag('convention', 'string', 'peft', f'peft, of QA-LoRA: {" or ".join(peft.CONVENTIONS)}.'),
    config_lib.Flag('allow_lossy', 'bool', False, 'hf-gptq: round offsets to integer zero-points.'),
  )
  arguments = config_lib.parse('export', argv, summary=SUMMARY, extra_flags=flags)
  hosts.alone('export')
  values = arguments.values
  chosen = values['format']
  _check_values(values)
  if not (values['output'] or arguments.workdir):
    raise ValueError('say where to write: --output=DIRECTORY, or --workdir of the run.')
  output = pathlib.Path(values['output'] or pathlib.Path(arguments.workdir) / f'export_{chosen}')
  tensors.refuse_existing(output)
  if values['adapters']:
    loaded = adapted.open_summed(arguments.config, values['model'], values['adapters'])
  else:
    loaded = build.open_model(arguments.config, arguments.workdir, values['model'])
  if chosen == 'peft':
    export_adapter(loaded, output, values['convention'])
    return
  export(
    loaded,
    arguments.config,
    output,
    format=chosen,
    dtype=values['dtype'],
    widen=values['dense'],
    lossy=values['allow_lossy'],
  )


def _check_values(values: dict) -> None:
  chosen, dtype = values['format'], values['dtype']
  if chosen not in _NAMES:
    raise ValueError(f'--format={chosen}: no such format; there are {", ".join(_NAMES)}.')
  known = FORMATS[chosen].DTYPES if chosen in FORMATS else ('float32',)
  if dtype not in known:
    raise ValueError(f'--dtype={dtype}: what is dense in a {chosen} directory is stored in {" or ".join(known)}.')
  for flag, owner in _OWN_FLAGS.items():
    if values[flag] and chosen != owner:
      raise ValueError(f'--{flag} is for --format={owner}, and says nothing of {chosen}: leave it out.')
  if hasattr(FORMATS.get(chosen), 'library'):
    FORMATS[chosen].library()
  if values['convention'] not in peft.CONVENTIONS:
    raise ValueError(f'--convention={values["convention"]}: it is one of {", ".join(peft.CONVENTIONS)}.')


def export_adapter(loaded: build.Loaded, output: pathlib.Path, convention: str) -> None:
  """Writes the adapter in PEFT's form and reads it back.  Raises ValueError as `peft.write`."""
  config, params = loaded.model.config, loaded.variables['params']
  if heads := loaded.model.scheme.heads:
    raise ValueError(
      f'the {" and the ".join(heads)} trained beside the adapter, and --format=peft writes adapters alone: merge them '
      'into a model with --format=qalora or hf.'
    )
  base = str(loaded.origin['source'])
  with tensors.fresh(output) as temporary:
    peft.write(temporary, config, params, base=base, convention=convention)
    choices = peft.describe(temporary, config)
    back = peft.load(temporary, config, nn.unbox(build.adapters_of(loaded.model, choices)))
    _check_equal(several.factors(params, loaded.variables['frozen']), several.factors(back, loaded.variables['frozen']))
  progress.console.print(
    f'read back: every A and B equal up to the rounding of its scale\n'
    f'{adapters.count(params):,} parameters of the adapter of {base}\nwritten to {output}'
  )


def _check_equal(before: list, after: list) -> None:
  """ValueError where an adapter that was read back is another one."""
  for (a, b), (a_back, b_back) in zip(before, after, strict=True):
    # B was multiplied by the convention's factor, divided by it, and twice scaled.
    rounding = 4 * jnp.finfo(jnp.float32).eps * jnp.abs(b)
    if not (jnp.array_equal(a, a_back) and (jnp.abs(b - b_back) <= rounding).all()):
      raise ValueError('not written: the adapter is not read back as it was; please report this.')


def export(loaded: build.Loaded, config, output: pathlib.Path, *, format: str, **choices) -> None:
  """Merges, checks, writes, reads back; `choices` are those of `job.Job`.  The directory appears when all holds.

  Raises ValueError for a merge that is not equal, and for a format that cannot hold it without loss.
  """
  tree, provenance = _merged(loaded, config, format)
  job = job_lib.Job(
    loaded.model.config,
    tree,
    tokenizer_from=loaded.tokenizer_from,
    bos=loaded.tokenizer.bos,
    eos=loaded.tokenizer.eos,
    provenance=provenance,
    **choices,
  )
  FORMATS[format].check(job)
  layers = sum(loaded.model.config.depths.values())
  with tensors.fresh(output) as temporary:
    with progress.bar('writing weights', layers) as bar:
      FORMATS[format].write(temporary, job, bar.advance)
    with progress.bar('reading them back', layers) as bar:
      verified = FORMATS[format].verify(temporary, job, bar.advance)
  progress.console.print(f'{verified}\n{quant.summary(tree)}\nwritten to {output}')


def _merged(loaded: build.Loaded, config, format: str) -> tuple[dict, dict]:
  """The tree of the merged model, and where it comes from."""
  frozen, params = loaded.variables['frozen'], loaded.variables['params']
  provenance = dict(loaded.origin, merged=bool(params))
  if not frozen:
    tree = quant.settle(params)
    if quant.matrices(tree) and (difference := merge.moved(loaded.model, params, tree)):
      raise ValueError(f'not written: the codes move the logits by {difference:.2e}; please report this.')
    return tree, provenance
  if not params:
    return frozen, provenance
  tree = merge.merge(frozen, params)
  lost = len(quant.matrices(frozen)) - len(quant.matrices(tree))
  if lost and format != 'hf':
    raise ValueError(
      f'{lost} quantized weights carry a LoRA adapter, which changes weights within a group: codes and offsets cannot '
      'hold it. Write it dense with --format=hf (and quantize that again, with loss), or train with adapter.kind = '
      '"qalora", which merges exactly.'
    )
  found = merge.check(loaded.model, frozen, params, tree)
  progress.console.print(str(found))
  if not found.holds:
    raise ValueError(f'not written: {found}. The merged model is not the trained one; please report this.')
  provenance |= {'difference': found.difference, 'tolerance': found.tolerance}
  if 'adapters' not in loaded.origin:
    provenance['adapter'] = config.adapter.to_dict()
  return tree, provenance

"""`qalora export`: merges a run, proves the merge, writes it in a format that others load."""

import pathlib

from qalora_jax import build
from qalora_jax import config as config_lib
from qalora_jax import hf
from qalora_jax import packed
from qalora_jax import progress
from qalora_jax import quant
from qalora_jax import tensors
from qalora_jax.export import merge

FORMATS = ('qalora', 'hf')
SUMMARY = (
  'Merges the run in --workdir (or takes --model) and writes it to --output.\n'
  '--format=qalora: still quantized, loads again here.  --format=hf: dense, any Hugging Face program loads it.\n'
  'A merge whose logits differ from the adapted model by more than rounding is not written.  What QAT trained is\n'
  'written in the codes that it was trained with.'
)


def main(argv=None) -> None:
  """Runs the command with `argv`."""
  flags = (
    config_lib.Flag('model', 'string', '', 'A workdir or model directory other than --workdir.'),
    config_lib.Flag('format', 'string', 'qalora', f'One of {", ".join(FORMATS)}.'),
    config_lib.Flag('output', 'string', '', 'Directory to write (default: WORKDIR/export_FORMAT).'),
    config_lib.Flag('dtype', 'string', 'float32', 'hf only: float32, bfloat16 or float16.'),
  )
  arguments = config_lib.parse('export', argv, summary=SUMMARY, extra_flags=flags)
  values = arguments.values
  if values['format'] not in FORMATS:
    raise ValueError(f'--format={values["format"]}: no such format; there are {", ".join(FORMATS)}.')
  if not (values['output'] or arguments.workdir):
    raise ValueError('say where to write: --output=DIRECTORY, or --workdir of the run.')
  output = pathlib.Path(values['output'] or pathlib.Path(arguments.workdir) / f'export_{values["format"]}')
  tensors.refuse_existing(output)
  loaded = build.open_model(arguments.config, arguments.workdir, values['model'])
  export(loaded, arguments.config, output, format=values['format'], dtype=values['dtype'])


def export(loaded: build.Loaded, config, output: pathlib.Path, *, format: str, dtype: str = 'float32') -> None:
  """Merges, checks and writes.

  Raises ValueError for a merge that is not equal, and for a format that cannot hold it without loss.
  """
  frozen, params = loaded.variables['frozen'], loaded.variables['params']
  tree, provenance = frozen, dict(loaded.origin, merged=bool(params))
  if not frozen:
    tree = quant.settle(params)
    if quant.matrices(tree) and (difference := merge.moved(loaded.model, params, tree)):
      raise ValueError(f'not written: the codes move the logits by {difference:.2e}; please report this.')
  elif params:
    tree = merge.merge(frozen, params)
    _refuse_lossy(frozen, tree, format)
    found = merge.check(loaded.model, frozen, params, tree)
    progress.console.print(str(found))
    if not found.holds:
      raise ValueError(f'not written: {found}. The merged model is not the trained one; please report this.')
    provenance |= {'difference': found.difference, 'tolerance': found.tolerance, 'adapter': config.adapter.to_dict()}
  common = dict(
    tokenizer_from=loaded.tokenizer_from,
    bos=loaded.tokenizer.bos,
    eos=loaded.tokenizer.eos,
  )
  if format == 'qalora' and not quant.matrices(tree):
    raise ValueError('nothing in this model is quantized; write it with --format=hf.')
  with progress.bar('writing weights', loaded.model.config.num_hidden_layers) as bar:
    if format == 'hf':
      hf.write(output, loaded.model.config, tree, dtype=dtype, progress=bar.advance, **common)
    else:
      packed.write(output, loaded.model.config, tree, provenance=provenance, progress=bar.advance, **common)
  progress.console.print(f'{quant.summary(tree)}\nwritten to {output}')


def _refuse_lossy(frozen: dict, merged: dict, format: str) -> None:
  lost = len(quant.matrices(frozen)) - len(quant.matrices(merged))
  if format == 'qalora' and lost:
    raise ValueError(
      f'{lost} quantized weights carry a LoRA adapter, which changes weights within a group: codes and offsets cannot '
      'hold it. Write it dense with --format=hf (and quantize that again, with loss), or train with adapter.kind = '
      '"qalora", which merges exactly.'
    )

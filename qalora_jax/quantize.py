"""`qalora quantize`: a dense model in, a quantized directory out, with a report of what it cost."""

import pathlib
import shutil
import sys

import jax
import ml_collections

from qalora_jax import adapters
from qalora_jax import bases
from qalora_jax import build
from qalora_jax import calibrate
from qalora_jax import cli
from qalora_jax import config as config_lib
from qalora_jax import hf
from qalora_jax import hosts
from qalora_jax import inspection
from qalora_jax import lock
from qalora_jax import packed
from qalora_jax import progress
from qalora_jax import quant
from qalora_jax import report
from qalora_jax import stored
from qalora_jax import tensors
from qalora_jax.data import calibration
from qalora_jax.data import records
from qalora_jax.evaluate import command as evaluate
from qalora_jax.models import linear

SUMMARY = (
  'Quantizes config.model.source as config.base says, layer by layer, and writes it to --workdir: a directory that\n'
  'train, evaluate, generate and export load as model.source.  With config.calibration.text every weight is measured\n'
  '(and by GPTQ, refine, budget chosen) on the inputs that this text makes; with config.evaluate.text perplexity is\n'
  'printed before and after.  Run again after an interruption, it goes on after its last finished layer.'
)
REPORT, ERRORS, CODES = 'quantization.json', 'quantization_errors.png', 'quantization_codes.png'


def main(argv=None) -> None:
  """Runs the command with `argv`."""
  arguments = config_lib.parse('quantize', argv, summary=SUMMARY)
  hosts.alone('quantize')
  config, workdir = arguments.config, arguments.workdir
  if config.base.method == 'qat':
    raise ValueError('base.method = "qat" is trained: use `qalora train` with adapter.kind = "full", then export.')
  if config.base.method == 'stored' and config.adapter.init == 'zero':
    raise ValueError('base.method = "stored" leaves the weights as they are; choose "affine", "gptq", "nf4" or "fp4".')
  if config.model.source == 'scratch':
    raise ValueError('model.source = "scratch" has no weights to quantize; train it, export it, then name the export.')
  if config.adapter.init == 'zero':
    # What begins at zero is drawn by `train`.
    config.adapter.kind = 'none'
  if build.names_data(config.evaluate.text):
    # What could not be scored at the end is refused now.
    records.read(build.source(config.evaluate.text))
    evaluate.check(build.setup(_dense(config)).model, _text_alone(config), wanted=[])
  rows = quantize(config, workdir, arguments.command)
  _inspect(config, workdir, rows, arguments.command)


def _dense(config) -> ml_collections.ConfigDict:
  """The config without a classifier that is to be trained, which is no part of a base; the source's goes along."""
  config = config.copy_and_resolve_references()
  config.model.update(labels=0, train_pooler=False)
  return config


def _text_alone(config) -> ml_collections.ConfigDict:
  """The config with evaluate.text for all that is scored."""
  config = config.copy_and_resolve_references()
  config.evaluate.tasks = ''
  for dataset in (config.evaluate.choices, config.evaluate.generation):
    dataset.update(path='', recipe='')
  return config


def quantize(config, workdir, command: str = 'qalora train') -> list[dict]:
  """Writes the quantized directory `workdir` with its report, and returns the report's rows, one a matrix.

  Raises ValueError, before any long work, for what cannot be.
  """
  workdir = pathlib.Path(workdir)
  tensors.refuse_existing(workdir)
  config = _dense(config)
  built = build.setup(config)
  if stored.is_quantized(built.directory):
    raise ValueError(f'{built.directory} is already quantized; start from its dense source.')
  tokens, scheme = build.tokenizer(config, built), built.model.scheme
  samples, beginning = _samples(config, built, tokens), None
  if config.adapter.init != 'zero':
    if scheme.adapts('lm_head') and 'lm_head' in built.shapes['params']:
      raise ValueError('adapter.targets selects lm_head, which begins at zero only: leave it out or set adapter.init.')
    beginning = calibrate.Beginning(config.adapter.init, config.adapter.init_iterations, config.seed)
  partial = workdir.absolute().parent / f'.{workdir.name}.unfinished'
  settings = bases.settings(config)
  model = built.model.config
  with lock.alone(partial):
    tensors.refuse_existing(workdir)  # another run may have finished since
    with progress.bar('quantizing layers', sum(model.depths.values())) as bar:
      result = calibrate.quantize(
        hf.Source(built.directory, model),
        model,
        scheme,
        samples,
        mesh=build.make_mesh(config),
        batch=config.calibration.batch,
        true_sequential=config.calibration.true_sequential,
        beginning=beginning,
        budget=config.base.budget,
        partial=partial,
        settings=settings,
        progress=bar.advance,
      )
    provenance = {'source': config.model.source, 'base': config.base.to_dict(), 'merged': False, 'settings': settings}
    with progress.bar('writing weights', sum(model.depths.values())) as bar:
      packed.write(
        workdir,
        model,
        result.frozen,
        provenance=provenance,
        adapter=(bases.beginning(config), result.params) if beginning else None,
        tokenizer_from=build.tokenizer_directory(config, built.directory),
        bos=tokens.bos,
        eos=tokens.eos,
        progress=bar.advance,
      )
    shutil.rmtree(partial)
  trained = f', {adapters.count(result.params):,} parameters of adapters to begin with' if result.params else ''
  progress.console.print(f'{quant.summary(result.frozen)}{trained}\nwritten to {workdir}')
  report.write(workdir / REPORT, report.document(command, result.rows))
  report.show(f'worst by {inspection.measure(result.rows)}', inspection.worst(result.rows))
  _plot(result, workdir)
  progress.console.print(f'every weight: {workdir / REPORT}; plots beside it')
  return result.rows


def _samples(config, built, tokens):
  """The calibration windows, or None where the config names no text."""
  settings = config.calibration
  if not build.names_data(settings.text):
    return None
  calibrate.check_stacks(built.model.config, 'calibration.text')
  limit = built.model.config.max_position_embeddings
  if settings.length > limit:
    raise ValueError(
      f'calibration.length = {settings.length} is beyond the {limit} positions of the model; set '
      f'calibration.length = {limit} or less.'
    )
  source = build.source(settings.text)
  found = calibration.samples(
    records.read(source), tokens, length=settings.length, count=settings.samples, seed=config.seed, path=source.path
  )
  progress.console.print(f'calibrating on {len(found)} windows of {settings.length} tokens of {source.path}')
  return found


def _plot(result: calibrate.Result, workdir: pathlib.Path) -> None:
  inspection.plot_errors(result.rows, workdir / ERRORS)
  named = []
  for path, leaf in jax.tree.leaves_with_path(result.frozen, is_leaf=quant.is_quantized):
    if quant.is_quantized(leaf):
      name = jax.tree_util.keystr(path, simple=True, separator='/').removesuffix('/kernel')
      named.append((name.removeprefix(f'{linear.STACK}/'), leaf))
  if named:
    inspection.plot_codes(named, workdir / CODES)


def _inspect(config, workdir, rows: list[dict], command: str) -> None:
  """Prints perplexity before and after on the text that the config names, if any, and adds it to the report."""
  if not build.names_data(config.evaluate.text):
    return
  scores, config = [], _text_alone(config)
  config.base.update(method='stored', rules='', budget=0.0)
  for name, model in (('before', config.model.source), ('after', str(workdir))):
    scores.append({'model': name} | evaluate.evaluate(build.load_model(config, model), config))
  report.show('perplexity', scores)
  report.write(pathlib.Path(workdir) / REPORT, report.document(command, rows, perplexity=scores))


if __name__ == '__main__':
  cli.run(main, 'qalora quantize', sys.argv[1:])

"""`qalora VERB`: finds the verb's module, and turns a user's error into one line instead of a traceback."""

import difflib
import importlib
import importlib.metadata
import pathlib
import sys

from qalora_jax import preemption

# Imported only when called: `qalora --help` should not wait for JAX.
_MODULES = {
  'plan': 'qalora_jax.plan',
  'quantize': 'qalora_jax.quantize',
  'train': 'qalora_jax.train',
  'launch': 'qalora_jax.launch',
  'evaluate': 'qalora_jax.evaluate.command',
  'export': 'qalora_jax.export.command',
  'generate': 'qalora_jax.generate.command',
}
_PACKAGE = pathlib.Path(__file__).resolve().parent

_HELP = """\
qalora fine-tunes language models whose frozen weights stay in 2 to 8 bits,
and folds the trained adapter back into those weights without loss (QA-LoRA).

usage: qalora VERB [--config=FILE] [--workdir=DIR] [--config.KEY=VALUE ...] [flags]

The verbs, in their natural order; what one writes, the next one reads:
  plan       what a training step takes on TPUs and GPUs that need not be here
  quantize   a dense model in, a model of 2 to 8 bits out (train can also do this as it loads)
  train      trains an adapter, or every weight; the same command again goes on where it stopped
  launch     train as a job of Slurm, or in several processes of this machine
  evaluate   perplexity and multiple choice
  export     merges the adapter and writes a model that others can load
  generate   continues prompts, or holds a conversation (--chat)

For example, after `make quickstart`:
  qalora quantize --config=configs/quickstart_questions.py --workdir=runs/four --config.base.method=affine
  qalora train    --config=configs/quickstart_questions.py --workdir=runs/taught --config.model.source=runs/four
  qalora evaluate --workdir=runs/taught
  qalora export   --workdir=runs/taught
  qalora generate --workdir=runs/taught --prompt='Question: '

qalora VERB --help lists a verb's flags.  Every config KEY is explained in configs/base.py.
qalora --version prints the version."""


def main(argv=None):
  """The `qalora` program.  `argv` holds what follows its name; None means the command line's."""
  argv = list(sys.argv[1:] if argv is None else argv)
  if not argv or argv[0] in ('-h', '-help', '--help', 'help'):
    print(_HELP)
    return
  verb, *rest = argv
  if verb == '--version':
    print(f'qalora_jax {importlib.metadata.version("qalora_jax")}')
    return
  if verb not in _MODULES:
    close = difflib.get_close_matches(verb, _MODULES, n=1)
    hint = f'did you mean {close[0]!r}?' if close else f'the verbs are {", ".join(_MODULES)}'
    _fail('qalora', f'no verb {verb!r}; {hint}')
  run(command(verb), f'qalora {verb}', rest)


def command(verb):
  """What `qalora VERB` calls with its arguments; its errors are Python's."""
  return importlib.import_module(_MODULES[verb]).main


def run(main, program, argv=None, also=()):
  """Calls `main(argv)`; what the user can put right ends in one line on stderr and exit status 2.

  That is every OSError, and every ValueError whose last frame is qalora_jax's own, or in one of the folders `also`.
  Anything else, a ValueError out of another library included, is a defect and keeps its traceback.  A run that was told
  to stop says where it is, and has its own status: 0 after SIGTERM.
  """
  try:
    main(argv)
  except preemption.Stopped as stopped:
    print(f'{program}: {stopped}')
    raise SystemExit(stopped.status) from None
  except OSError as error:
    _fail(program, error)
  except ValueError as error:
    if not {_PACKAGE, *also} & set(_raised_in(error).parents):
      raise
    _fail(program, error)


def _raised_in(error):
  frame = error.__traceback__
  while frame.tb_next:
    frame = frame.tb_next
  return pathlib.Path(frame.tb_frame.f_code.co_filename).resolve()


def _fail(program, error):
  print(f'{program}: error: {error}', file=sys.stderr)
  raise SystemExit(2) from None

"""`qalora quantize`: a dense model in, a quantized directory out."""

import sys

from qalora_jax import build
from qalora_jax import cli
from qalora_jax import config as config_lib
from qalora_jax import packed
from qalora_jax import progress
from qalora_jax import quant
from qalora_jax import tensors

SUMMARY = (
  'Quantizes config.model.source as config.base says, weight by weight as it is read, and writes it to --workdir:\n'
  'a directory that train, evaluate, generate and export load as model.source.'
)


def main(argv=None) -> None:
  """Runs the command with `argv`."""
  arguments = config_lib.parse('quantize', argv, summary=SUMMARY)
  config, workdir = arguments.config, arguments.workdir
  if config.base.method == 'stored':
    raise ValueError('base.method = "stored" leaves the weights as they are; choose "affine".')
  if config.model.source == 'scratch':
    raise ValueError('model.source = "scratch" has no weights to quantize; train it, export it, then name the export.')
  tensors.refuse_existing(workdir)
  config.adapter.kind = 'none'
  built = build.setup(config)
  if packed.is_packed(built.directory):
    raise ValueError(f'{built.directory} is already quantized; start from its dense source.')
  tokens = build.tokenizer(config, built)
  tree = build.load_weights(built)
  with progress.bar('writing weights', built.model.config.num_hidden_layers) as bar:
    packed.write(
      workdir,
      built.model.config,
      tree,
      provenance={'source': config.model.source, 'base': config.base.to_dict(), 'merged': False},
      tokenizer_from=build.tokenizer_directory(config, built.directory),
      bos=tokens.bos,
      eos=tokens.eos,
      progress=bar.advance,
    )
  progress.console.print(f'{quant.summary(tree)}\nwritten to {workdir}')


if __name__ == '__main__':
  cli.run(main, 'quantize', sys.argv[1:])

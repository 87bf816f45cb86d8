"""`qalora generate`: text from a prompt, from many, or in a conversation."""

import contextlib
import dataclasses
import functools
import json
import pathlib
import sys

from flax import linen as nn

from qalora_jax import adapted
from qalora_jax import build
from qalora_jax import cli
from qalora_jax import config as config_lib
from qalora_jax import families
from qalora_jax import hosts
from qalora_jax import objectives
from qalora_jax import progress
from qalora_jax import tokenizer as tokenizer_lib
from qalora_jax.data import records
from qalora_jax.generate import cache
from qalora_jax.generate import chat

SUMMARY = (
  'Continues --prompt (or answers it, with a model that has an encoder): --model, else the run in --workdir, else\n'
  'config.model.source.\n'
  '--chat: a conversation, your words from standard input, in the chat template of the tokenizer.\n'
  '--prompts: every record of a JSONL file ({"prompt": ...} a line), config.generate.batch at a time; they go to\n'
  '--output, or to standard output, with the text that was written.\n'
  'config.generate holds length, sampling and stop strings; config.seed the draws.'
)


def main(argv=None) -> str | list[dict]:
  """Runs the command with `argv`; prints the text as it comes and returns it (with --prompts, the records)."""
  flags = (
    config_lib.Flag('model', 'string', '', 'A workdir, Hugging Face directory, exported directory or hub id.'),
    adapted.FLAG,
    config_lib.Flag(
      'adapter', 'string', '', 'Which of the named --adapters to use (records of --prompts say their own).'
    ),
    config_lib.Flag('prompt', 'string', '', 'The text to continue; with --chat, what you say first.'),
    config_lib.Flag('prompts', 'string', '', 'A JSONL file of records with a "prompt".'),
    config_lib.Flag('output', 'string', '', 'With --prompts: the JSONL file to write.'),
    config_lib.Flag('chat', 'bool', False, 'Hold a conversation; an empty line or end of input ends it.'),
    config_lib.Flag('system', 'string', '', 'With --chat: the system message.'),
  )
  arguments = config_lib.parse('generate', argv, summary=SUMMARY, extra_flags=flags)
  hosts.alone('generate')
  config, values = arguments.config, arguments.values
  if bool(values['prompts']) + bool(values['chat']) + bool(values['prompt'] and not values['chat']) > 1:
    raise ValueError('--prompt, --prompts and --chat exclude each other (but --chat may begin with a --prompt).')
  for name, other in (('output', 'prompts'), ('system', 'chat')):
    if values[name] and not values[other]:
      raise ValueError(f'--{name} goes with --{other}; leave it out, or give both.')
  output = pathlib.Path(values['output']) if values['output'] else None
  if output and output.exists():
    raise ValueError(f'--output={output} exists; name another file or remove it first.')
  asked = records.prompts(values['prompts']) if values['prompts'] else []
  model = adapted.open_any(config, arguments.workdir, values['model'], values['adapters'], _check_writes)
  model.check([values['adapter'], *(_named(record, '') for record in asked)])
  if values['prompts']:
    return _many(model, config, asked, values['adapter'], output)
  loaded = dataclasses.replace(model.loaded, variables=model.variables([values['adapter']]))
  if values['chat']:
    return _converse(loaded, config, values['prompt'], values['system'])
  if cache.continues(loaded.model):
    print(values['prompt'], end='', flush=True)
  return _one(loaded, config, build.prompt(loaded, values['prompt']))


def _check_writes(model: nn.Module) -> None:
  """ValueError for a model that writes nothing."""
  if families.objective(model.config) is objectives.LABELS:
    raise ValueError(f'a model of type {model.config.family!r} says labels of sentences and writes nothing.')


def _one(loaded: build.Loaded, config, tokens: list[int]) -> str:
  """Shows what continues one prompt."""
  (text,) = build.write(loaded, config, [tokens], show=functools.partial(print, end='', flush=True))
  print()
  return text


def _many(model: adapted.Adapted, config, asked: list[dict], usual: str, output: pathlib.Path | None) -> list[dict]:
  """The records with "text": what continues each prompt by the adapter that it names, else by the `usual` one.

  Written batch by batch into a file that takes the name of `output` when it is whole.
  """
  loaded, made = model.loaded, []
  prompts = [build.prompt(loaded, record['prompt']) for record in asked]
  for number, prompt in enumerate(prompts, start=1):
    try:
      cache.check(loaded.model, prompt)
    except ValueError as error:
      raise ValueError(f'record {number} of --prompts: {error}') from error
  partial = output.with_name(f'.{output.name}.unfinished') if output else None
  if output:
    output.parent.mkdir(parents=True, exist_ok=True)
  with progress.bar('writing', len(asked)) as bar, contextlib.ExitStack() as stack:
    file = stack.enter_context(partial.open('w', encoding='utf-8')) if partial else None
    for start in range(0, len(asked), config.generate.batch):
      rows = slice(start, start + config.generate.batch)
      variables = model.variables([_named(record, usual) for record in asked[rows]])
      batch = dataclasses.replace(loaded, variables=variables)
      for record, text in zip(asked[rows], build.write(batch, config, prompts[rows], start), strict=True):
        made.append({**record, 'text': text})
        print(json.dumps(made[-1], ensure_ascii=False), file=file, flush=True)
        bar.advance()
  if output:
    partial.replace(output)
  return made


def _named(record: dict, usual: str) -> str:
  """The adapter that a record asks for; '' for none."""
  return usual if record.get('adapter') is None else record['adapter']


def _converse(loaded: build.Loaded, config, first: str, system: str) -> str:
  """A conversation; the last answer."""
  template = chat.template(loaded.tokenizer_from)
  messages = [{'role': 'system', 'content': system}] if system else []
  answer, said = '', first or _heard()
  while said:
    messages.append({'role': 'user', 'content': said})
    written = chat.render(template, messages, loaded.tokenizer_from)
    answer = _one(loaded, config, tokenizer_lib.encode_marked(loaded.tokenizer, written))
    messages.append({'role': 'assistant', 'content': answer})
    said = _heard()
  return answer


def _heard() -> str:
  """A line of standard input; empty at its end."""
  if sys.stdin.isatty():
    print('> ', end='', flush=True)
  try:
    return sys.stdin.readline().strip()
  except UnicodeDecodeError as error:
    raise ValueError(f'standard input is not {error.encoding} ({error.reason}).') from error


if __name__ == '__main__':
  cli.run(main, 'qalora generate', sys.argv[1:])

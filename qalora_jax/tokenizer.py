"""Text to token ids and back, for SentencePiece models and `tokenizers` files."""

import collections.abc
import dataclasses
import functools
import json
import pathlib
import re
import shutil

import sentencepiece
import tokenizers

# One of these is a tokenizer; the others that belong to it lie beside it in a Hugging Face directory.
_MODELS = ('tokenizer.model', 'tokenizer.json', 'spiece.model')
FILES = (
  *_MODELS,
  'tokenizer_config.json',
  'special_tokens_map.json',
  'added_tokens.json',
  'vocab.json',
  'merges.txt',
  'chat_template.jinja',
)


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """A pair of functions between text and ids, and the ids that delimit a document.

  `encode(text) -> list[int]` adds no special token; `decode(ids) -> str` leaves special tokens out.
  `bos` and `eos` are None where the vocabulary has none.  Ids lie in [0, vocab_size).
  """

  vocab_size: int
  bos: int | None
  eos: int | None
  encode: collections.abc.Callable[[str], list[int]]
  decode: collections.abc.Callable[[collections.abc.Iterable[int]], str]
  unknown: int | None = None
  # {spelling: id} of tokens that `encode` does not find in a text; `encode_marked` does.  Those that a directory adds
  # to its SentencePiece model lie beyond vocab_size.
  marks: dict[str, int] = dataclasses.field(default_factory=dict)
  # framed(first, second or None, limit) -> `Framed`: as an encoder reads sentences; None where the tokenizer does not
  # say how.
  framed: collections.abc.Callable[[str, str | None, int], 'Framed'] | None = None


@dataclasses.dataclass(frozen=True)
class Framed:
  """A sentence or a pair between an encoder's marks: [CLS] first [SEP], or [CLS] first [SEP] second [SEP].

  types: 0 for the first part and its marks, 1 for the second.  cut: tokens left out at the ends of the parts so that
  there are at most `limit` (0: no limit), of the longer part first, as transformers' `longest_first` does.
  """

  ids: list[int]
  types: list[int]
  cut: int


def load(directory) -> Tokenizer:
  """The tokenizer of a directory: its `tokenizer.model` (SentencePiece), `tokenizer.json`, or else T5's `spiece.model`.

  SentencePiece models hold their own BOS and EOS.  For `tokenizer.json` they are the `bos_token` and
  `eos_token` of `tokenizer_config.json` (a null there means none), or where it does not say, the
  `bos_token_id` and `eos_token_id` of `config.json` (the first, if a list).

  Raises FileNotFoundError if there is no such file, ValueError if one cannot be read or names an unknown token.
  """
  directory = pathlib.Path(directory)
  if (directory / 'tokenizer.model').is_file():
    return _load_sentencepiece(directory / 'tokenizer.model')
  if (directory / 'tokenizer.json').is_file():
    return _load_tokenizers(directory)
  if (directory / 'spiece.model').is_file():
    return _load_sentencepiece(directory / 'spiece.model')
  raise FileNotFoundError(f'{directory}: no tokenizer here; looked for {", ".join(_MODELS)}')


def encode_marked(tokenizer: Tokenizer, text: str) -> list[int]:
  """The ids of a text in which special tokens are spelled out, as chat templates write them: `<s>[INST] ...`."""
  if not tokenizer.marks:
    return tokenizer.encode(text)
  ids = []
  for part in re.split(f'({"|".join(map(re.escape, tokenizer.marks))})', text):
    if part:
      ids += [tokenizer.marks[part]] if part in tokenizer.marks else tokenizer.encode(part)
  return ids


def copy(source, target) -> None:
  """Copies those of `FILES` that exist in the directory `source`, byte for byte, into the directory `target`.

  Raises FileNotFoundError if `source` holds no tokenizer.
  """
  source, target = pathlib.Path(source), pathlib.Path(target)
  if not any((source / name).is_file() for name in _MODELS):
    raise FileNotFoundError(f'{source}: no tokenizer to copy; looked for {", ".join(_MODELS)}')
  target.mkdir(parents=True, exist_ok=True)
  for name in FILES:
    if (source / name).is_file():
      shutil.copyfile(source / name, target / name)


def train_bpe(texts, vocab_size: int, directory) -> None:
  """Fits a byte-level BPE to `texts` and writes `tokenizer.json` and `tokenizer_config.json` into `directory`.

  Id 0 is `<s>` (BOS), id 1 is `</s>` (EOS), then come the 256 bytes and the merges, so every text can be
  encoded and decoded without loss.  The same texts give the same files.  Texts that have too few pairs to merge
  give a smaller vocabulary than asked for.

  Raises ValueError if `vocab_size` does not hold the bytes and the two special tokens.
  """
  if vocab_size < 258:
    raise ValueError(f'vocab_size = {vocab_size} is too small; 256 bytes and 2 special tokens need at least 258')
  bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
  bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  bpe.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=['<s>', '</s>'],
    initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  bpe.train_from_iterator(texts, trainer)
  directory = pathlib.Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  bpe.save(str(directory / 'tokenizer.json'))
  special = {'bos_token': '<s>', 'eos_token': '</s>', 'tokenizer_class': 'PreTrainedTokenizerFast'}
  (directory / 'tokenizer_config.json').write_text(json.dumps(special, indent=2) + '\n', encoding='utf-8')


def chat_template(directory) -> str | None:
  """The chat template of a directory: chat_template.jinja, else `chat_template` of tokenizer_config.json, or None.

  Of several named ones it is `default`.
  """
  directory = pathlib.Path(directory)
  if (directory / 'chat_template.jinja').is_file():
    return (directory / 'chat_template.jinja').read_text(encoding='utf-8')
  found = _read_object(directory / 'tokenizer_config.json').get('chat_template')
  if isinstance(found, list):
    named = [entry for entry in found if isinstance(entry, dict)]
    found = {entry.get('name'): entry.get('template') for entry in named}.get('default')
  return found


def special_tokens(directory) -> dict[str, str]:
  """{'bos_token': '<s>', ...} as tokenizer_config.json names them."""
  stated = _read_object(pathlib.Path(directory) / 'tokenizer_config.json')
  named = {key: value for key, value in stated.items() if key.endswith('_token')}
  content = {key: value.get('content') if isinstance(value, dict) else value for key, value in named.items()}
  return {key: value for key, value in content.items() if isinstance(value, str)}


def sentencepiece_model(path: pathlib.Path):
  """The pieces and rules of a SentencePiece model, as its protocol buffer says them."""
  # Slow to import, and of use to exports alone.
  from sentencepiece import sentencepiece_model_pb2

  model = sentencepiece_model_pb2.ModelProto()
  model.ParseFromString(path.read_bytes())
  return model


def added_tokens(directory) -> dict[int, tuple[str, bool]]:
  """{id: (spelling, whether it is special)} of tokens that a directory adds to its SentencePiece model.

  From `added_tokens_decoder` of tokenizer_config.json and from added_tokens.json, whose tokens count as special.
  """
  directory = pathlib.Path(directory)
  found = {token: (text, True) for text, token in _read_object(directory / 'added_tokens.json').items()}
  described = _read_object(directory / 'tokenizer_config.json').get('added_tokens_decoder') or {}
  return found | {int(token): (entry['content'], bool(entry.get('special'))) for token, entry in described.items()}


def _load_sentencepiece(path: pathlib.Path) -> Tokenizer:
  directory, processor = path.parent, sentencepiece.SentencePieceProcessor()
  try:
    processor.LoadFromSerializedProto(path.read_bytes())
  except RuntimeError as error:
    raise ValueError(f'{path}: not a SentencePiece model ({error})') from error
  size, added = processor.vocab_size(), added_tokens(directory)
  marks = {processor.id_to_piece(i): i for i in range(size) if processor.is_control(i)}
  marks |= {text: token for token, (text, _) in added.items()}

  # SentencePiece reports a missing special token as id -1.
  def special(token: int) -> int | None:
    return token if token >= 0 else None

  def decode(ids) -> str:
    text, run = '', []
    for token in [*map(int, ids), None]:
      if token is not None and token < size:
        run.append(token)
        continue
      text += processor.decode(run) if run else ''
      run = []
      if token is not None:
        # Special tokens, and rows of the embedding that no token has, are left out.
        spelling, is_special = added.get(token, ('', True))
        text += '' if is_special else spelling
    return text

  eos = special(processor.eos_id())
  stated = special_tokens(directory).get('eos_token')
  return Tokenizer(
    vocab_size=size,
    bos=special(processor.bos_id()),
    # A model that was taught to chat may end in a token that was added.
    eos=marks.get(stated, eos) if stated else eos,
    encode=processor.encode,
    decode=decode,
    unknown=special(processor.unk_id()),
    marks=marks,
  )


def _load_tokenizers(directory: pathlib.Path) -> Tokenizer:
  path = directory / 'tokenizer.json'
  try:
    backend = tokenizers.Tokenizer.from_file(str(path))
  except Exception as error:  # tokenizers raises no narrower class
    raise ValueError(f'{path}: not a tokenizers file ({error})') from error
  # Some published files pad or cut every text; how long a document may be is for the examples to decide.
  backend.no_padding()
  backend.no_truncation()
  return Tokenizer(
    vocab_size=max(backend.get_vocab(with_added_tokens=True).values()) + 1,
    bos=_special_id(directory, backend, 'bos_token'),
    eos=_special_id(directory, backend, 'eos_token'),
    encode=lambda text: backend.encode(text, add_special_tokens=False).ids,
    decode=lambda ids: backend.decode([int(token) for token in ids]),
    # Two marks around one part, and one more after a second: what only adds BOS or EOS frames nothing.
    framed=functools.partial(_frame, backend) if _marks(backend) == (2, 3) else None,
  )


def _marks(backend: tokenizers.Tokenizer) -> tuple[int, int]:
  return tuple(backend.num_special_tokens_to_add(pair) for pair in (False, True))


def _frame(backend: tokenizers.Tokenizer, first: str, second: str | None, limit: int) -> Framed:
  parts = [backend.encode(text, add_special_tokens=False) for text in (first, second) if text is not None]
  lengths = [len(part.ids) for part in parts]
  room = max(limit - _marks(backend)[len(parts) - 1], 0) if limit else sum(lengths)
  kept = lengths
  if sum(lengths) > room:
    shorter = 0 if len(parts) == 1 else min(lengths)
    # Where both are cut, the one that was longer (of two alike the second) has what does not divide by two.
    shorter = shorter if 2 * shorter <= room else room // 2
    longer = max(range(len(parts)), key=lambda index: (lengths[index], index))
    kept = [room - shorter if index == longer else shorter for index in range(len(parts))]
  for part, length in zip(parts, kept, strict=True):
    part.truncate(length)
  made = backend.post_process(*parts)
  return Framed(made.ids, made.type_ids, sum(lengths) - sum(kept))


def _special_id(directory: pathlib.Path, backend: tokenizers.Tokenizer, name: str) -> int | None:
  described = _read_object(directory / 'tokenizer_config.json')
  if name not in described:
    token = _read_object(directory / 'config.json').get(f'{name}_id')
    return token[0] if isinstance(token, list) else token
  token = described[name]['content'] if isinstance(described[name], dict) else described[name]
  if token is None:
    return None
  found = backend.token_to_id(token)
  if found is None:
    raise ValueError(f'{directory}: {name} {token!r} of tokenizer_config.json is not in tokenizer.json')
  return found


def _read_object(path: pathlib.Path) -> dict:
  if not path.is_file():
    return {}
  try:
    return json.loads(path.read_text(encoding='utf-8'))
  except ValueError as error:
    raise ValueError(f'{path}: not valid JSON ({error})') from error

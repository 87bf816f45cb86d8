"""Tensors in safetensors files: headers, reading one at a time, writing shards; and directories that appear whole."""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
import contextlib
import dataclasses
import json
import os
import pathlib
import shutil

import ml_dtypes
import numpy as np
import safetensors
from safetensors import numpy as safetensors_numpy

SINGLE = 'model.safetensors'
INDEX = 'model.safetensors.index.json'
# The dtypes that are read, under safetensors' names.
DTYPES = {
  'F32': np.float32,
  'F16': np.float16,
  'BF16': ml_dtypes.bfloat16,
  'U32': np.uint32,
  'I32': np.int32,
  'U8': np.uint8,
}
_PICKLES = ('*.bin', '*.pth', '*.pt')
_NAMED_AT_MOST = 8


@dataclasses.dataclass(frozen=True)
class Header:
  """A tensor as a file announces it; `dtype` is safetensors' name, e.g. 'BF16'."""

  file: pathlib.Path
  shape: tuple[int, ...]
  dtype: str


@dataclasses.dataclass(frozen=True)
class Wanted:
  """What a tensor has to be: its shape and one of `dtypes`."""

  shape: tuple[int, ...]
  dtypes: tuple[str, ...]


def headers(directory) -> tuple[dict[str, Header], list[str]]:
  """Every tensor of a directory's safetensors files, and what is wrong with the set; no tensor is read.

  Raises FileNotFoundError where there are none or the index names an absent file, ValueError for a damaged file.
  """
  files, index = _files(pathlib.Path(directory))
  found, problems = {}, []
  for file in files:
    for name, header in headers_of(file).items():
      if name in found:
        problems.append(f'{name} is in {found[name].file.name} and again in {file.name}')
      found[name] = header
  for name, file in index.items():
    if name in found and found[name].file.name != file:
      problems.append(f'{name} is in {found[name].file.name}, but {INDEX} places it in {file}')
  return found, problems


def check(
  directory,
  found: dict[str, Header],
  wanted: dict[str, Wanted],
  problems: Iterable[str] = (),
  ignored: Callable[[str], bool] = lambda name: False,
) -> None:
  """One ValueError for `problems` and every missing, unexpected, misshapen or wrongly typed tensor together."""
  problems = list(problems)
  problems += [f'{name} is missing' for name in wanted if name not in found]
  problems += [f'{name} is unexpected' for name in found if name not in wanted and not ignored(name)]
  for name in wanted.keys() & found.keys():
    have, want = found[name], wanted[name]
    if have.shape != want.shape:
      problems.append(f'{name} has shape {list(have.shape)}, not {list(want.shape)}')
    if have.dtype not in want.dtypes:
      problems.append(f'{name} is stored as {have.dtype}, not as {" or ".join(want.dtypes)}')
  if problems:
    shown = sorted(problems)[:_NAMED_AT_MOST]
    if len(problems) > len(shown):
      shown.append(f'and {len(problems) - len(shown)} more')
    raise ValueError(f'{directory} does not hold the weights that its config.json describes:\n  ' + '\n  '.join(shown))


def read(name: str, header: Header) -> np.ndarray:
  """The tensor that `headers` announced."""
  with _open(header.file) as file:
    return file.get_tensor(name)


def write(directory, tensors: Iterable[tuple[str, np.ndarray]], shard_bytes: int) -> None:
  """Writes named tensors into model.safetensors or, beyond `shard_bytes`, into numbered shards and their index.

  Holds one shard in memory; a tensor larger than `shard_bytes` gets a shard of its own.
  """
  directory = pathlib.Path(directory)
  shards, held, size, total = [], {}, 0, 0
  for name, tensor in tensors:
    if held and size + tensor.nbytes > shard_bytes:
      shards.append(_save(directory, len(shards), held))
      held, size = {}, 0
    # safetensors writes the buffer of a transposed view as it lies, without its strides.
    held[name] = np.asarray(tensor, order='C')
    size += tensor.nbytes
    total += tensor.nbytes
  shards.append(_save(directory, len(shards), held))
  if len(shards) == 1:
    shards[0][0].rename(directory / SINGLE)
    return
  placed = {}
  for number, (file, names) in enumerate(shards, start=1):
    final = f'model-{number:05d}-of-{len(shards):05d}.safetensors'
    file.rename(directory / final)
    placed.update(dict.fromkeys(names, final))
  write_json(directory / INDEX, {'metadata': {'total_size': total}, 'weight_map': dict(sorted(placed.items()))})


def refuse_existing(directory) -> None:
  """Raises ValueError where `directory` exists and is not an empty directory: nothing is ever overwritten."""
  target = pathlib.Path(directory)
  if target.exists() and (not target.is_dir() or any(target.iterdir())):
    raise ValueError(f'{directory} exists and is not empty; name another directory or remove it first.')


@contextlib.contextmanager
def fresh(directory) -> Iterator[pathlib.Path]:
  """A temporary sibling that becomes `directory` when the block ends and vanishes when it raises.

  Raises ValueError where `directory` exists and is not an empty directory.
  """
  refuse_existing(directory)
  target = pathlib.Path(directory).absolute()
  target.parent.mkdir(parents=True, exist_ok=True)
  temporary = target.parent / f'.{target.name}.{os.getpid()}.unfinished'
  temporary.mkdir()
  try:
    yield temporary
    temporary.replace(target)
  except BaseException:
    shutil.rmtree(temporary)
    raise


def read_json(path: pathlib.Path) -> dict:
  """The object in a JSON file; ValueError naming the file where it holds none."""
  try:
    value = json.loads(path.read_text(encoding='utf-8'))
  except (UnicodeDecodeError, json.JSONDecodeError) as error:
    raise ValueError(f'{path}: not JSON ({error}); copy or download it again.') from error
  if not isinstance(value, dict):
    raise ValueError(f'{path}: holds a {type(value).__name__}, not a JSON object.')
  return value


def write_json(path: pathlib.Path, value: dict) -> None:
  """Writes `value`, whole or not at all, so that a person can read it and a second writing gives the same bytes."""
  partial = path.with_name(f'.{path.name}.{os.getpid()}')
  partial.write_text(json.dumps(value, indent=2) + '\n', encoding='utf-8')
  partial.replace(path)


def _files(directory: pathlib.Path) -> tuple[list[pathlib.Path], dict[str, str]]:
  """The safetensors files of a directory, and {tensor name: file name} as far as an index says it."""
  single, index = directory / SINGLE, directory / INDEX
  if single.exists() and index.exists():
    raise ValueError(f'{directory} holds both {SINGLE} and {INDEX}; remove the one that is out of date.')
  if single.exists():
    return [single], {}
  if not index.exists():
    raise FileNotFoundError(f'{directory} holds no {SINGLE} and no {INDEX}.{_pickles(directory)}')
  placed = read_json(index).get('weight_map')
  if not isinstance(placed, dict) or not all(isinstance(name, str) for name in placed.values()):
    raise ValueError(f'{index}: has no "weight_map" from tensor names to file names.')
  files = [directory / name for name in sorted(set(placed.values()))]
  for file in files:
    if file.parent != directory or not file.is_file():
      raise FileNotFoundError(f'{index} names {file.name}, which is not in {directory}; download that shard too.')
  return files, placed


def _pickles(directory: pathlib.Path) -> str:
  """What to say about pickled weights in a directory without any others."""
  pickled = sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern))
  if not pickled:
    return ''
  return (
    f' Its {pickled[0]} is a pickle, which can run any code when it is opened, so it is not read; convert it with '
    "transformers' `model.save_pretrained(directory, safe_serialization=True)` in an environment that you trust."
  )


def headers_of(file: pathlib.Path) -> dict[str, Header]:
  """Every tensor of one safetensors file as it is announced; ValueError where the file is damaged."""
  with _open(file) as opened:
    slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - the handle is no mapping
    return {name: Header(file, tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}


def _open(file: pathlib.Path):
  try:
    return safetensors.safe_open(file, framework='np')
  except safetensors.SafetensorError as error:
    raise ValueError(f'{file}: damaged or cut short ({error}); copy or download it again.') from error


def save_file(file: pathlib.Path, tensors: dict, metadata: dict[str, str] | None = None) -> None:
  """Writes one safetensors file, which appears whole; arrays may be on a device."""
  held = {name: np.asarray(tensor, order='C') for name, tensor in tensors.items()}
  partial = file.with_name(f'.{file.name}.{os.getpid()}')
  # transformers refuses a file that does not say 'pt'.
  safetensors_numpy.save_file(held, partial, metadata={'format': 'pt', **(metadata or {})})
  # safetensors makes files for their owner alone; give them the directory's rights, as any other file has.
  partial.chmod(file.parent.stat().st_mode & 0o666)
  partial.replace(file)


def load_file(file: pathlib.Path) -> dict[str, np.ndarray]:
  """Every tensor of one safetensors file; FileNotFoundError or ValueError naming it where it is absent or damaged."""
  if not file.is_file():
    raise FileNotFoundError(f'{file}: not found; make the directory again.')
  with _open(file) as opened:
    return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - the handle is no mapping


def metadata(file: pathlib.Path) -> dict[str, str]:
  """The metadata of one safetensors file."""
  with _open(file) as opened:
    return opened.metadata() or {}


def _save(directory: pathlib.Path, number: int, tensors: dict[str, np.ndarray]) -> tuple[pathlib.Path, list[str]]:
  file = directory / f'shard-{number}.safetensors'
  save_file(file, tensors)
  return file, list(tensors)

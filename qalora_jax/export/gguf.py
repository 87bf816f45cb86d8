"""GGUF files, as llama.cpp loads them: blocks of 32 inputs with float16 constants, tokenizer and metadata inside.

    Q4_1    w = d * u + m      u = code + 8      d = scale      m = offset - 8 * scale
    Q4_0    w = d * code       4 bits without offsets
    Q8_0    w = d * code       8 bits without offsets

Scale and offset are rounded to float16 once; other widths have no block of their own here (llama.cpp's Q2_K and Q3_K
quantize their constants again).  Matrices are dense in float32, float16, bfloat16 or rounded to Q8_0; norms in float32.

llama.cpp joins no repeated spaces, as some SentencePiece models do, and stops at a character that a vocabulary without
bytes does not have: such texts it reads otherwise.
"""

from collections.abc import Callable
import contextlib
import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from qalora_jax import layout
from qalora_jax import tensors
from qalora_jax import tokenizer as tokenizer_lib
from qalora_jax.export import job as job_lib
from qalora_jax.export import verify as verify_lib
from qalora_jax.models import layers
from qalora_jax.models import rotary
from qalora_jax.quant import qtensor

FILE = 'model.gguf'
# The families that llama.cpp has as `llama`.
_LLAMAS = ('llama', 'mistral')
BLOCK = 32
DTYPES = ('float32', 'float16', 'bfloat16', 'q8_0')
_DENSE = {'float32': 'F32', 'float16': 'F16', 'bfloat16': 'BF16', 'q8_0': 'Q8_0'}
# What splits a text into words before its byte pairs are merged, {regular expression of tokenizer.json: llama.cpp's
# name}; LLaMA 3 takes up to three digits together, Qwen 2 one.
_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = {_SPLIT % r'\p{N}{1,3}': 'llama-bpe', _SPLIT % r'\p{N}': 'qwen2'}


def check(job: job_lib.Job) -> None:
  """ValueError for a model that these blocks cannot hold, a tokenizer that llama.cpp does not know, and where the gguf
  package is absent.
  """
  library()
  _check_family(job.config)
  for _, name, leaf in layout.matrices(job.config, job.tree):
    if not job.widen and _block(leaf) is None:
      held = 'offsets' if leaf.offset is not None else 'no offsets'
      raise ValueError(
        f'{name} holds {leaf.levels} codes of {leaf.bits} bits in groups of {leaf.group} with {held}; gguf holds '
        f'4 bits, and 8 bits without offsets, in groups that are multiples of {BLOCK}.  --dense writes such matrices '
        'dense; --format=mlx holds 8, 4, 3 and 2 bits with offsets, --format=qalora all.'
      )
  for path, name, leaf in layout.parts(job.config, jax.eval_shape(lambda: job.tree)):
    inputs = leaf.shape[0] if layout.is_matrix(path) else leaf.shape[-1]
    if kind(leaf, job.dtype, job.widen) == 'Q8_0' and inputs % BLOCK:
      raise ValueError(f'--dtype=q8_0: the {inputs} inputs of {name} do not divide into blocks of {BLOCK}.')
  vocabulary(job.tokenizer_from)


def write(directory, job: job_lib.Job, progress: Callable[[], None] | None = None) -> None:
  """Writes `directory`/model.gguf tensor by tensor; the directory appears when it is whole."""
  gguf, config = library(), job.config
  blank = jax.eval_shape(lambda: job.tree)
  kinds = {name: kind(leaf, job.dtype, job.widen) for path, name, leaf in layout.parts(config, blank)}
  with tensors.fresh(directory) as temporary, contextlib.closing(gguf.GGUFWriter(temporary / FILE, 'llama')) as writer:
    _describe(writer, gguf, config, kinds)
    _add_tokenizer(writer, gguf, job)
    for path, name, leaf in layout.parts(config, blank):
      shape = leaf.shape[::-1] if layout.is_matrix(path) else leaf.shape
      quantized = gguf.GGMLQuantizationType[kinds[name]]
      block, size = gguf.GGML_QUANT_SIZES[quantized]
      count = int(np.prod(shape)) // block * size
      writer.add_tensor_info(_name(gguf, config, name), shape, np.dtype(np.float32), count, raw_dtype=quantized)
    factors = _rope_factors(config)
    if factors is not None:
      writer.add_tensor_info('rope_freqs.weight', factors.shape, factors.dtype, factors.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for path, name, leaf in layout.parts(config, job.tree, progress):
      writer.write_tensor_data(_turned(config, name, encode(path, leaf, kinds[name], gguf)))
    if factors is not None:
      writer.write_tensor_data(factors)


def verify(directory, job: job_lib.Job, progress: Callable[[], None] | None = None) -> verify_lib.Verified:
  """Reads every weight back by the gguf package; ValueError where one differs by more than rounding."""
  gguf, config = library(), job.config
  found = {tensor.name: tensor for tensor in gguf.GGUFReader(pathlib.Path(directory) / FILE).tensors}

  def read(path, name):
    tensor = found[_name(gguf, config, name)]
    value = gguf.quants.dequantize(np.asarray(tensor.data), tensor.tensor_type)
    value = _turned(config, name, value.reshape(tensor.shape[::-1].tolist()), back=True)
    return value.T if layout.is_matrix(path) else value

  # Half a step of float16, and below its normal numbers half of its smallest step.
  half, least = float(np.finfo(np.float16).eps) / 2, float(np.finfo(np.float16).smallest_subnormal)

  def allowed(path, leaf):
    written = kind(leaf, job.dtype, job.widen)
    if isinstance(leaf, qtensor.QTensor) and written == _block(leaf):
      # Scale and offset are rounded, and once more the sum in which m = offset - 8 * scale is made.
      return verify_lib.rounding(leaf, 2 * half) + 2.0**leaf.bits * least
    value = verify_lib.dense(leaf)
    if written == 'Q8_0':
      rows = value.T if layout.is_matrix(path) else value
      size = np.repeat(np.abs(rows).reshape(*rows.shape[:-1], -1, BLOCK).max(-1), BLOCK, axis=-1)
      # Half a step of 1 / 127 of the block's largest entry, and the rounding of that step.
      step = size * (0.5 / 127 + 2 * half) + 127 * least
      return step.T if layout.is_matrix(path) else step
    return np.abs(value) * {'F32': 0.0, 'F16': half, 'BF16': 2.0**-8}[written] + least

  return verify_lib.verify(config, job.tree, 'gguf', read, allowed, progress)


def library():
  """The gguf package; ValueError saying how to get it."""
  try:
    import gguf
  except ImportError as error:
    raise ValueError(
      f'the gguf package is needed, and does not load ({error}): pip install "qalora_jax[gguf]".'
    ) from error
  return gguf


def _check_family(config: layers.Config) -> None:
  """ValueError for what llama.cpp's `llama` does not compute, as which every model is written."""
  problem = ''
  if config.family not in _LLAMAS:
    problem = f'model_type {config.family!r}'
  elif config.biased or config.activation != 'silu':
    problem = 'a LLaMA with biases' if config.biased else f'hidden_act = {config.activation!r}'
  elif config.cut_short:
    problem = f'sliding_window = {config.window}'
  if problem:
    raise ValueError(
      f"{problem}: the gguf files written here are of llama.cpp's `llama`, a LLaMA or a Mistral whose tokens see all "
      'that came before; write --format=hf and convert that, or --format=qalora.'
    )


def kind(leaf, dtype: str, widen: bool) -> str:
  """The name of the type that a leaf is written in."""
  if isinstance(leaf, qtensor.QTensor):
    block = _block(leaf)
    return _DENSE[dtype] if block is None and widen else block
  return _DENSE[dtype] if leaf.ndim > 1 else 'F32'


def encode(path: str, leaf, name: str, gguf) -> np.ndarray:
  """The bytes or numbers [outputs, ...] of a leaf in the type called `name`."""
  if isinstance(leaf, qtensor.QTensor) and name == _block(leaf):
    return _packed(leaf, name)
  value = verify_lib.dense(leaf)
  value = np.ascontiguousarray(value.T if layout.is_matrix(path) else value)
  if name in ('F32', 'F16'):
    return value.astype({'F32': np.float32, 'F16': np.float16}[name])
  return gguf.quants.quantize(value, gguf.GGMLQuantizationType[name])


def _block(q: qtensor.QTensor) -> str | None:
  """The block that holds a matrix with no more than float16's rounding; None where there is none."""
  if q.levels != 'integer' or q.group % BLOCK:
    return None
  if q.offset is None:
    return {4: 'Q4_0', 8: 'Q8_0'}.get(q.bits)
  return 'Q4_1' if q.bits == 4 else None


def _packed(q: qtensor.QTensor, name: str) -> np.ndarray:
  """[O, bytes] of a matrix in blocks: constants, then two codes a byte (the first half of a block in the low bits)."""
  codes, d, m = (np.asarray(part) for part in _constants(q))
  repeat = lambda x: np.repeat(x, q.group // BLOCK, axis=0).T.astype('<f2')[..., None]
  blocks = codes.T.reshape(q.shape[-1], -1, BLOCK)
  parts = [repeat(d).view(np.uint8)]
  if name == 'Q4_1':
    parts.append(repeat(m).view(np.uint8))
  if name == 'Q8_0':
    parts.append(blocks.view(np.uint8))
  else:
    unsigned = (blocks + 8).astype(np.uint8)
    parts.append(unsigned[..., : BLOCK // 2] | (unsigned[..., BLOCK // 2 :] << 4))
  return np.concatenate(parts, axis=-1).reshape(q.shape[-1], -1)


@jax.jit
def _constants(q: qtensor.QTensor):
  """Codes int8 [I, O], d and m [L, O]."""
  scale = qtensor.scales(q)
  return qtensor.codes(q).astype(jnp.int8), scale, qtensor.offsets(q) - 8 * scale


def _name(gguf, config: layers.Config, name: str) -> str:
  """llama.cpp's name of a tensor: blk.0.attn_q.weight."""
  return _names(gguf.get_tensor_name_map, gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers).get_name(name, ('.weight',))


_names = functools.lru_cache(maxsize=1)(lambda table, kind, layers: table(kind, layers))


def _turned(config: layers.Config, name: str, rows: np.ndarray, back: bool = False) -> np.ndarray:
  """The rows (outputs) of q_proj and k_proj as llama.cpp rotates them: it pairs neighbours, not halves of a head."""
  heads = {'q_proj': config.num_attention_heads, 'k_proj': config.num_key_value_heads}
  count = heads.get(layout.module(name).rpartition('.')[2])
  if count is None:
    return rows
  # [head, half, pair] <-> [head, pair, half]
  halves = (-1, 2) if back else (2, -1)
  return np.ascontiguousarray(rows.reshape(count, *halves, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape))


def _rope_factors(config: layers.Config) -> np.ndarray | None:
  """What LLaMA-3's rotary frequencies are divided by, for every pair."""
  if config.rope_scaling is None:
    return None
  stretched = rotary.frequencies(config.rope_theta, config.head_dim, config.rope_scaling)
  return np.asarray(rotary.frequencies(config.rope_theta, config.head_dim) / stretched, np.float32)


def _describe(writer, gguf, config: layers.Config, kinds: dict[str, str]) -> None:
  writer.add_type(gguf.GGUFType.MODEL)
  writer.add_context_length(config.max_position_embeddings)
  writer.add_embedding_length(config.hidden_size)
  writer.add_block_count(config.num_hidden_layers)
  writer.add_feed_forward_length(config.intermediate_size)
  writer.add_head_count(config.num_attention_heads)
  writer.add_head_count_kv(config.num_key_value_heads)
  writer.add_key_length(config.head_dim)
  writer.add_value_length(config.head_dim)
  writer.add_rope_dimension_count(config.head_dim)
  writer.add_rope_freq_base(config.rope_theta)
  writer.add_layer_norm_rms_eps(config.rms_norm_eps)
  writer.add_vocab_size(config.vocab_size)
  # The commonest type of the projections.
  common = [found for name, found in kinds.items() if '_proj' in name]
  file = max(set(common), key=common.count)
  writer.add_file_type(gguf.LlamaFileType[('ALL_' if file == 'F32' else 'MOSTLY_') + file])
  writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


@dataclasses.dataclass
class Vocabulary:
  """A tokenizer as llama.cpp holds it; `kinds` are numbered as SentencePiece's pieces are."""

  model: str
  words: str
  tokens: list[str]
  kinds: list[int]
  scores: list[float] = dataclasses.field(default_factory=list)
  merges: list[str] = dataclasses.field(default_factory=list)
  space_before: bool = False
  unknown: int | None = None


_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5


def vocabulary(directory) -> Vocabulary:
  """The tokenizer of a directory; ValueError for one that llama.cpp does not know."""
  directory = pathlib.Path(directory)
  if (directory / 'tokenizer.model').is_file():
    return _sentencepiece(directory / 'tokenizer.model')
  return _byte_pairs(directory / 'tokenizer.json')


def _add_tokenizer(writer, gguf, job: job_lib.Job) -> None:
  """The vocabulary, padded to the rows of the embedding, and the chat template."""
  found = vocabulary(job.tokenizer_from)
  missing = range(len(found.tokens), job.config.vocab_size)
  writer.add_tokenizer_model(found.model)
  writer.add_tokenizer_pre(found.words)
  writer.add_token_list([*found.tokens, *(f'[PAD{index}]' for index in missing)])
  writer.add_token_types([gguf.TokenType(kind) for kind in [*found.kinds, *(_UNUSED for _ in missing)]])
  if found.scores:
    writer.add_token_scores([*found.scores, *(0.0 for _ in missing)])
    writer.add_add_space_prefix(found.space_before)
  if found.merges:
    writer.add_token_merges(found.merges)
  writer.add_add_bos_token(job.bos is not None)
  writer.add_add_eos_token(False)
  ids = (
    (writer.add_bos_token_id, job.bos),
    (writer.add_eos_token_id, job.eos),
    (writer.add_unk_token_id, found.unknown),
  )
  for add, token in ids:
    if token is not None:
      add(token)
  template = tokenizer_lib.chat_template(job.tokenizer_from)
  if template:
    writer.add_chat_template(template)


def _sentencepiece(file: pathlib.Path) -> Vocabulary:
  model = tokenizer_lib.sentencepiece_model(file)
  spec, trainer = model.normalizer_spec, model.trainer_spec
  if trainer.model_type != trainer.BPE or spec.precompiled_charsmap:
    raise ValueError(
      f'{file}: llama.cpp knows SentencePiece models of byte pairs without normalization; this one is of type '
      f'{trainer.ModelType.Name(trainer.model_type)} with normalization {spec.name!r}: write --format=mlx or hf.'
    )
  found = Vocabulary(
    model='llama',
    words='default',
    tokens=[piece.piece for piece in model.pieces],
    kinds=[piece.type for piece in model.pieces],
    scores=[piece.score for piece in model.pieces],
    space_before=spec.add_dummy_prefix,
    unknown=trainer.unk_id,
  )
  for token, (text, special) in sorted(tokenizer_lib.added_tokens(file.parent).items()):
    kind = _CONTROL if special else _USER_DEFINED
    if token < len(model.pieces):
      continue  # Said again of <unk>, <s> or </s>.
    while len(found.tokens) <= token:
      found.tokens.append(f'[PAD{len(found.tokens)}]')
      found.kinds.append(_UNUSED)
      found.scores.append(0.0)
    found.tokens[token], found.kinds[token] = text, kind
  return found


def _byte_pairs(file: pathlib.Path) -> Vocabulary:
  stated = tensors.read_json(file)
  words, model = _words(stated), stated.get('model', {})
  # Qwen's normalizes to NFC, which its own GGUF files leave out too.
  normalizes = stated.get('normalizer') and not (words == 'qwen2' and stated['normalizer'].get('type') == 'NFC')
  if model.get('type') != 'BPE' or words is None or normalizes:
    raise ValueError(
      f'{file}: llama.cpp knows byte-level BPE with the words of GPT-2, LLaMA 3 or Qwen 2, and this is none of them: '
      'put the tokenizer.model beside it if there is one, or write --format=mlx or hf.'
    )
  added = {token['id']: token for token in stated.get('added_tokens', [])}
  named = {index: token for token, index in model['vocab'].items()}
  named |= {index: token['content'] for index, token in added.items()}
  tokens, kinds = [], []
  for index in range(max(named) + 1):
    tokens.append(named.get(index, f'[PAD{index}]'))
    special = _CONTROL if index in added and added[index].get('special') else _USER_DEFINED
    kinds.append(_UNUSED if index not in named else special if index in added else _NORMAL)
  # Both spellings of a pair are in use: 'a b' and ['a', 'b'].
  merges = [pair if isinstance(pair, str) else ' '.join(pair) for pair in model['merges']]
  return Vocabulary(model='gpt2', words=words, tokens=tokens, kinds=kinds, merges=merges)


def _words(stated: dict) -> str | None:
  """llama.cpp's name of a tokenizer's way to split words."""
  before = stated.get('pre_tokenizer') or {}
  steps = before.get('pretokenizers', [before])
  if [step.get('type') for step in steps] == ['ByteLevel']:
    return 'gpt-2' if steps[0].get('use_regex', True) and not steps[0].get('add_prefix_space') else None
  if [step.get('type') for step in steps] != ['Split', 'ByteLevel'] or steps[1].get('use_regex', True):
    return None
  return _WORDS.get(steps[0].get('pattern', {}).get('Regex'))

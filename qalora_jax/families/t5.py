"""T5, T5 v1.1 and FLAN-T5 as Hugging Face keeps them."""

from collections.abc import Mapping

from qalora_jax import objectives
from qalora_jax.families import family
from qalora_jax.models import linear
from qalora_jax.models import t5

# {key of config.json: field of ModelConfig}.
_REQUIRED = {
  'vocab_size': 'vocab_size',
  'd_model': 'hidden_size',
  'd_ff': 'intermediate_size',
  'd_kv': 'head_dim',
  'num_layers': 'num_hidden_layers',
  'num_heads': 'num_attention_heads',
}
# Absent or null, these mean the default of ModelConfig, which is that of transformers.
_COUNTS = {
  'relative_attention_num_buckets': 'relative_attention_num_buckets',
  'relative_attention_max_distance': 'relative_attention_max_distance',
  'n_positions': 'max_position_embeddings',
}
_OPTIONAL = _COUNTS | {
  'layer_norm_epsilon': 'layer_norm_epsilon',
  'feed_forward_proj': 'feed_forward_proj',
  'decoder_start_token_id': 'decoder_start_token_id',
}
# What a T5 may say only in one way here; absent, it means the same.
_WRITTEN = {'is_encoder_decoder': True}
_FIXED = {**_WRITTEN, 'is_decoder': False, 'scalable_attention': False}
# What transformers works out of feed_forward_proj, and may write beside it.
_ACTIVATIONS = {'relu': ('relu', False), 'gated-gelu': ('gelu_new', True)}

NAMES = {
  'embedding': 'shared.weight',
  'encoder_table': 'encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight',
  'decoder_table': 'decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight',
  'encoder_norm/scale': 'encoder.final_layer_norm.weight',
  'decoder_norm/scale': 'decoder.final_layer_norm.weight',
  'lm_head/kernel': 'lm_head.weight',
}
# {module of a block: where it stands in a block of a file's encoder, and of its decoder}.
_PARTS = {
  'attention': {linear.ENCODER: 'layer.0.SelfAttention', linear.DECODER: 'layer.0.SelfAttention'},
  'cross': {linear.DECODER: 'layer.1.EncDecAttention'},
  'mlp': {linear.ENCODER: 'layer.1.DenseReluDense', linear.DECODER: 'layer.2.DenseReluDense'},
}
_MATRICES = {'q_proj': 'q', 'k_proj': 'k', 'v_proj': 'v', 'o_proj': 'o', 'down_proj': 'wo'}
_COPIES = ('encoder.embed_tokens.weight', 'decoder.embed_tokens.weight')
# Old files hold a table that no model reads.
_IGNORED = ('decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight',)


def read(raw: Mapping, **placed) -> t5.ModelConfig:
  """The config of a T5's config.json; `placed`: dtype, remat.

  Whether the head is tied: transformers 5 writes tie_word_embeddings = true of every T5, and of one whose head is its
  own scale_decoder_outputs = false.
  """
  family.check_counts(raw, _REQUIRED)
  family.check_counts(raw, family.stated(raw, (*_COUNTS, 'num_decoder_layers')))
  family.check_fixed(raw, _FIXED)
  said = {field: raw[key] for key, field in _REQUIRED.items()}
  said |= {_OPTIONAL[key]: value for key, value in family.stated(raw, _OPTIONAL).items()}
  decoder = family.value(raw, 'num_decoder_layers', raw['num_layers'])
  tied = family.value(raw, 'tie_word_embeddings', True)
  if family.value(raw, 'scale_decoder_outputs', tied) != tied:
    if not tied:
      raise ValueError('tie_word_embeddings = False, scale_decoder_outputs = True; a head of its own is not scaled.')
    tied = False
  said['layer_norm_epsilon'] = family.number(raw, 'layer_norm_epsilon', t5.ModelConfig.layer_norm_epsilon)
  config = t5.ModelConfig(**said, num_decoder_layers=decoder, tie_word_embeddings=tied, **placed)
  act, gated = _ACTIVATIONS[config.feed_forward_proj]
  family.check_fixed(raw, {'dense_act_fn': act, 'is_gated_act': gated})
  return config


def write(config: t5.ModelConfig) -> dict:
  """What config.json says of a T5."""
  keys = _REQUIRED | _OPTIONAL
  stated = {key: getattr(config, field) for key, field in keys.items()}
  # The padding of every published T5 is the token that its decoder begins with.
  return stated | {
    'num_decoder_layers': config.num_decoder_layers,
    'tie_word_embeddings': config.tie_word_embeddings,
    'scale_decoder_outputs': config.tie_word_embeddings,
    'pad_token_id': config.decoder_start_token_id,
    **_WRITTEN,
  }


def names(config: t5.ModelConfig) -> dict[str, str]:
  """{path: name}."""
  made = {path: name for path, name in NAMES.items() if not (config.tie_word_embeddings and path == 'lm_head/kernel')}
  wide = {'gate_proj': 'wi_0', 'up_proj': 'wi_1'} if config.gated else {'up_proj': 'wi'}
  for stack, sequence in config.sequence.items():
    for matrix in linear.matrices(sequence):
      part, _, projection = matrix.partition('/')
      place = f'{stack}.block.{{}}.{_PARTS[part][stack]}'
      made[f'{stack}/{part}_norm/scale'] = f'{place.rpartition(".")[0]}.layer_norm.weight'
      made[f'{stack}/{matrix}/kernel'] = f'{place}.{(_MATRICES | wide)[projection]}.weight'
  return made


def ignored(config: t5.ModelConfig, name: str) -> bool:
  """Copies of the embedding, that of a tied head among them, and a table that no model reads."""
  return name in _IGNORED or name in copies(config)


def copies(config: t5.ModelConfig) -> dict[str, str]:
  """The embedding of both stacks, and the head of a model that says it is tied."""
  heads = (NAMES['lm_head/kernel'],) if config.tie_word_embeddings else ()
  return dict.fromkeys((*_COPIES, *heads), NAMES['embedding'])


T5 = family.Family(
  model_type='t5',
  architecture='T5ForConditionalGeneration',
  module=t5.T5,
  read=read,
  write=write,
  names=names,
  ignored=ignored,
  copies=copies,
  objective=lambda config: objectives.ANSWERS,
  task_type='SEQ_2_SEQ_LM',
)

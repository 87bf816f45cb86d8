"""BERT and what is shaped like it (MiniLM) as Hugging Face keeps it, with a classifier or without.

Names are those of BertForSequenceClassification; BertModel's own files have no `bert.` in front, the first ones gamma
and beta for a norm's scale and bias.
"""

from collections.abc import Callable
from collections.abc import Mapping
import dataclasses

from qalora_jax import objectives
from qalora_jax.families import family
from qalora_jax.models import bert

_REQUIRED = ('vocab_size', 'hidden_size', 'intermediate_size', 'num_hidden_layers', 'num_attention_heads')
# Absent or null, these mean the default of ModelConfig, which is that of transformers.
_OPTIONAL = ('max_position_embeddings', 'type_vocab_size', 'layer_norm_eps', 'hidden_dropout_prob', 'pad_token_id')
# What a BERT may say only in one way here; absent, it means the same.
_WRITTEN = {'hidden_act': 'gelu', 'position_embedding_type': 'absolute'}
_FIXED = {**_WRITTEN, 'is_decoder': False, 'add_cross_attention': False}
_CLASSIFIES = 'BertForSequenceClassification'
_PROBLEMS = ('regression', 'single_label_classification')

_PREFIX, _OWN = 'bert.', ('embeddings.', 'encoder.', 'pooler.')
_LAYER = 'bert.encoder.layer.{}.'
# {path of a matrix or a norm: name}; each has a bias.
_BIASED = {
  'embedding_norm/scale': 'bert.embeddings.LayerNorm',
  'layers/attention/q_proj/kernel': _LAYER + 'attention.self.query',
  'layers/attention/k_proj/kernel': _LAYER + 'attention.self.key',
  'layers/attention/v_proj/kernel': _LAYER + 'attention.self.value',
  'layers/attention/o_proj/kernel': _LAYER + 'attention.output.dense',
  'layers/attention_norm/scale': _LAYER + 'attention.output.LayerNorm',
  'layers/mlp/up_proj/kernel': _LAYER + 'intermediate.dense',
  'layers/mlp/down_proj/kernel': _LAYER + 'output.dense',
  'layers/mlp_norm/scale': _LAYER + 'output.LayerNorm',
  'pooler/kernel': 'bert.pooler.dense',
  'classifier/kernel': 'classifier',
}
NAMES = {
  'embedding': 'bert.embeddings.word_embeddings.weight',
  'position_embedding': 'bert.embeddings.position_embeddings.weight',
  'type_embedding': 'bert.embeddings.token_type_embeddings.weight',
  **{path: f'{name}.weight' for path, name in _BIASED.items()},
  **{f'{path.rpartition("/")[0]}/bias': f'{name}.bias' for path, name in _BIASED.items()},
}


def read(raw: Mapping, **placed) -> bert.ModelConfig:
  """The config of a BERT's config.json; `placed`: dtype, remat.

  A classifier is there where `architectures` says so; its outputs are as many as id2label has entries.

  ValueError where num_labels or problem_type do not go with them.
  """
  family.check_counts(raw, _REQUIRED)
  family.check_fixed(raw, _FIXED)
  said = family.stated(raw, (*_REQUIRED, *_OPTIONAL))
  said['layer_norm_eps'] = family.number(raw, 'layer_norm_eps', bert.ModelConfig.layer_norm_eps)
  labels, words = _labels(raw) if _CLASSIFIES in (raw.get('architectures') or ()) else (0, ())
  dropped = family.value(
    raw, 'classifier_dropout', said.get('hidden_dropout_prob', bert.ModelConfig.hidden_dropout_prob)
  )
  return bert.ModelConfig(**said, classifier_dropout=dropped, labels=labels, words=words, **placed)


def _labels(raw: Mapping) -> tuple[int, tuple[str, ...]]:
  """(outputs of the classifier, what its classes are called where that is said)."""
  words = raw.get('id2label') or {}
  if set(words) != {str(label) for label in range(len(words))}:
    raise ValueError(f'id2label has the keys {", ".join(map(str, words))}; they are "0", "1", ...')
  labels = family.count(raw, 'num_labels', len(words) or 2)
  if words and len(words) != labels:
    raise ValueError(f'num_labels = {labels}, and id2label has {len(words)} entries: leave num_labels away.')
  problem = raw.get('problem_type')
  if problem is not None:
    family.check_choice('problem_type', problem, _PROBLEMS)
    if (problem == _PROBLEMS[0]) != (labels == 1):
      raise ValueError(f'problem_type = {problem!r} and {labels} label(s); {_PROBLEMS[0]!r} is of one, others of more.')
  called = tuple(str(words[str(label)]) for label in range(len(words)))
  return labels, () if called == _unnamed(labels) else called


def _unnamed(labels: int) -> tuple[str, ...]:
  """What transformers calls classes that have no name."""
  return tuple(f'LABEL_{label}' for label in range(labels))


def write(config: bert.ModelConfig) -> dict:
  """What config.json says of a BERT."""
  said = {key: getattr(config, key) for key in (*_REQUIRED, *_OPTIONAL, 'classifier_dropout')} | _WRITTEN
  if not config.labels:
    return said | {'architectures': ['BertModel']}
  names = config.words or _unnamed(config.labels)
  return said | {
    'architectures': [_CLASSIFIES],
    'id2label': {str(label): name for label, name in enumerate(names)},
    'label2id': {name: label for label, name in enumerate(names)},
    'problem_type': 'regression' if config.labels == 1 else 'single_label_classification',
  }


def names(config: bert.ModelConfig) -> dict[str, str]:
  """{path: name}."""
  absent = {bert.POOLER: not config.pooler, bert.CLASSIFIER: not config.labels}
  return {path: name for path, name in NAMES.items() if not absent.get(path.partition('/')[0])}


def spelled(name: str) -> str:
  """The name as NAMES has it, of a tensor as files have it."""
  name = name.replace('LayerNorm.gamma', 'LayerNorm.weight').replace('LayerNorm.beta', 'LayerNorm.bias')
  return _PREFIX + name if name.startswith(_OWN) else name


def ignored(config: bert.ModelConfig, name: str) -> bool:
  """What BERT was pretrained with, and a buffer that only counts."""
  return name.startswith('cls.') or name == 'bert.embeddings.position_ids'


def headed(config: bert.ModelConfig, labels: int, held: Callable[[], Mapping], pooler: bool = False) -> family.Headed:
  """With a classifier of `labels` outputs (0: as the source has it), which trains, and a pooler if the source has one.

  A classifier of another size than is asked for counts as none, and so does that of another task (of tokens, of
  choices).  What a source lacks is drawn, and trains; the source's pooler does where `pooler` says so.

  ValueError for a pooler that is to train before no classifier, and a classifier of another size than config.json says.
  """
  held, asked = held(), labels
  stored = held.get(NAMES['classifier/kernel']) if config.labels else None
  labels = labels or config.labels
  has_pooler = NAMES['pooler/kernel'] in held
  if not labels and pooler:
    raise ValueError('model.train_pooler = True, and the model has no classifier behind its pooler: set model.labels.')
  if not labels:
    return family.Headed(dataclasses.replace(config, labels=0, pooler=has_pooler))
  if not asked and stored and stored != (labels, config.hidden_size):
    raise ValueError(
      f'config.json says {labels} labels (num_labels, id2label), and {NAMES["classifier/kernel"]} has the shape '
      f'{stored}; correct config.json, or set model.labels to draw another.'
    )
  classifies = stored == (labels, config.hidden_size)
  config = dataclasses.replace(config, labels=labels, pooler=True, words=config.words if classifies else ())
  drawn = (() if has_pooler else (bert.POOLER,)) + (() if classifies else (bert.CLASSIFIER,))
  trains = (bert.POOLER, bert.CLASSIFIER) if pooler or not has_pooler else (bert.CLASSIFIER,)
  return family.Headed(config, trains=trains, drawn=drawn)


BERT = family.Family(
  model_type='bert',
  architecture='BertModel',
  module=bert.Bert,
  read=read,
  write=write,
  names=names,
  spelled=spelled,
  ignored=ignored,
  headed=headed,
  objective=lambda config: objectives.LABELS,
)

"""A small BERT that transformers wrote, its words, and sentences that can be told apart."""

import json
import pathlib

import pytest
import tokenizers

GOOD, BAD = ('good', 'fine', 'great', 'lovely'), ('bad', 'poor', 'dull', 'sad')
WORDS = (*GOOD, *BAD, 'film', 'play', 'plot', 'the', 'a', 'was', 'it', 'un')
VOCABULARY = ('[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', *WORDS, '##s', '##ly', '.')
SIZES = dict(
  vocab_size=len(VOCABULARY),
  hidden_size=32,
  intermediate_size=64,
  num_hidden_layers=2,
  num_attention_heads=4,
  max_position_embeddings=48,
)


def words(directory) -> pathlib.Path:
  """A WordPiece tokenizer.json as BERT's are, with its truncation and padding that are not to be heeded."""
  directory = pathlib.Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  made = tokenizers.Tokenizer(
    tokenizers.models.WordPiece({word: index for index, word in enumerate(VOCABULARY)}, unk_token='[UNK]')
  )
  made.add_special_tokens(list(VOCABULARY[:5]))
  made.normalizer = tokenizers.normalizers.BertNormalizer()
  made.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
  made.post_processor = tokenizers.processors.TemplateProcessing(
    single='[CLS] $A [SEP]',
    pair='[CLS] $A [SEP] $B:1 [SEP]:1',
    special_tokens=[('[CLS]', VOCABULARY.index('[CLS]')), ('[SEP]', VOCABULARY.index('[SEP]'))],
  )
  made.decoder = tokenizers.decoders.WordPiece()
  made.enable_truncation(6)
  made.enable_padding(length=6)
  made.save(str(directory / 'tokenizer.json'))
  (directory / 'tokenizer_config.json').write_text(json.dumps({'tokenizer_class': 'BertTokenizer'}))
  return directory


def checkpoint(directory, kind='BertModel', seed=0, **stated) -> pathlib.Path:
  """What transformers' class `kind` saves, with random weights (biases and norms too), and the tokenizer."""
  torch, transformers = pytest.importorskip('torch'), pytest.importorskip('transformers')
  torch.manual_seed(seed)
  model = getattr(transformers, kind)(transformers.BertConfig(**SIZES | stated))
  with torch.no_grad():
    for name, weight in model.named_parameters():
      middle = 1.0 if name.endswith('LayerNorm.weight') else 0.0
      weight.copy_(middle + 0.2 * torch.randn(weight.shape))
  model.save_pretrained(directory)
  return words(directory)

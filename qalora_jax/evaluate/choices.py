"""Multiple choice by log-likelihood: the model's answer is the choice it finds likeliest after the prompt."""

from flax import linen as nn
import numpy as np

from qalora_jax.data import examples as examples_lib
from qalora_jax.evaluate import perplexity


def accuracy(model: nn.Module, variables: dict, tokenizer, questions: list, *, window: int, batch: int, mesh) -> dict:
  """The share of `questions` answered right, by two rules, and its standard error sqrt(p (1 - p) / n).

  accuracy: argmax over choices of log p(choice | prompt).  accuracy_norm: of that divided by the choice's length in
  characters (lm-evaluation-harness's acc and acc_norm).  chance: the mean of 1 / number of choices.
  """
  encoded = [examples_lib.encode_question(question, tokenizer, window) for question in questions]
  flat = [example for rows in encoded for example in rows]
  nll, _ = perplexity.row_scores(
    model, variables, examples=flat, window=window, batch=batch, mesh=mesh, label='choices'
  )
  right, right_norm, begin = [], [], 0
  for question, rows in zip(questions, encoded, strict=True):
    own = -nll[begin : begin + len(rows)]
    begin += len(rows)
    lengths = np.array([len(choice) for choice in question.choices])
    right.append(int(np.argmax(own)) == question.answer)
    right_norm.append(int(np.argmax(own / lengths)) == question.answer)
  share = float(np.mean(right))
  return {
    'accuracy': share,
    'accuracy_norm': float(np.mean(right_norm)),
    'standard_error': float(np.sqrt(share * (1 - share) / len(questions))),
    'chance': float(np.mean([1 / len(q.choices) for q in questions])),
    'questions': len(questions),
  }

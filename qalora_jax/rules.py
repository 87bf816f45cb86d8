"""The text of base.rules: which weights differ from the rest, and in what."""

import re

# What a rule may not say: these are of the model as a whole.
_WHOLE = ('targets', 'rules', 'budget')


def parse(text: str, defaults: dict) -> tuple[tuple[str, dict], ...]:
  """((pattern, {key: value}), ...) of `PATTERN: key=value, ...; PATTERN: ...`, in order.

  `defaults`: the flattened config.base, whose keys may be set and whose types the values get; besides, method may be
  'dense'.  Raises ValueError naming the rule for anything else.
  """
  rules = []
  for rule in filter(None, (part.strip() for part in text.split(';'))):
    # The last colon: a pattern may hold others, as in (?:a|b).
    pattern, colon, settings = (part.strip() for part in rule.rpartition(':'))
    if not colon or not pattern:
      raise ValueError(f'base.rules: {rule!r} is not of the form `PATTERN: key=value, key=value`')
    try:
      re.compile(pattern)
    except re.error as error:
      raise ValueError(f'base.rules: {pattern!r} is not a regular expression: {error}') from None
    rules.append((pattern, dict(_setting(rule, item.strip(), defaults) for item in settings.split(','))))
  return tuple(rules)


def flatten(tree, prefix: str = '') -> dict:
  """{'gptq.damping': 0.01, ...} of nested mappings."""
  flat = {}
  for key, value in tree.items():
    flat |= flatten(value, f'{prefix}{key}.') if hasattr(value, 'items') else {f'{prefix}{key}': value}
  return flat


def _setting(rule: str, item: str, defaults: dict) -> tuple[str, object]:
  key, equals, word = (part.strip() for part in item.partition('='))
  known = [name for name in defaults if name not in _WHOLE]
  if not equals or key not in known:
    raise ValueError(f'base.rules: {item!r} in {rule!r}: write KEY=VALUE with KEY one of {", ".join(known)}')
  kind = type(defaults[key])
  try:
    return key, {'True': True, 'true': True, 'False': False, 'false': False}[word] if kind is bool else kind(word)
  except (KeyError, ValueError):
    raise ValueError(f'base.rules: {key}={word!r} in {rule!r} must be {kind.__name__}') from None

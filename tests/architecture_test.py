"""Who may import whom.  A new module needs a place in LAYERS; if none fits, its noun is not found yet."""

import ast
import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = 'qalora_jax'

# A module imports from its own layer and from those before it.  A name stands for a module and all below it;
# the longest name counts.
LAYERS = (
  (
    *('progress', 'rules', 'limits', 'topologies', 'collectives'),
    *('lock', 'preemption', 'events', 'hosts', 'aborts'),
  ),
  ('quant',),
  ('kernels',),
  ('adapters',),
  ('models',),
  ('objectives', 'step', 'optim', 'sharding'),
  (
    *(
      'families',
      'layout',
      'stacks',
      'checksum',
      'tensors',
      'hf',
      'packed',
      'gptq_files',
      'stored',
      'bitstream',
      'peft',
    ),
    *('tokenizer', 'data', 'checkpoint'),
  ),
  ('evaluate', 'export', 'generate', 'report', 'inspection', 'calibrate'),
  ('config', 'cli', 'bases', 'build', 'adapted', 'program'),
  ('evaluate.command', 'export.command', 'generate.command'),
  ('quantize',),
  ('train', 'plan', 'launch'),
  ('__main__', 'evaluate.__main__', 'export.__main__', 'generate.__main__'),
)
# The only rooms that read a ConfigDict.
DOORS = {
  'config',
  'cli',
  'bases',
  'build',
  'adapted',
  'program',
  'plan',
  'train',
  'launch',
  'quantize',
  'generate.command',
  'evaluate.command',
  'export.command',
}
# These run wherever jax, flax and optax do.
PURE = ('quant', 'kernels', 'adapters', 'models', 'objectives', 'step')
NOT_PURE = {
  'grain',
  'ml_collections',
  'orbax',
  'safetensors',
  'sentencepiece',
  'tokenizers',
  'huggingface_hub',
  'jinja2',
}
NO_NOUN = {'utils', 'util', 'common', 'misc', 'core', 'helpers'}


def modules():
  """{'quant.affine': ast, ...}; a package's __init__ goes by the package's name."""
  found = {}
  for path in sorted((ROOT / PACKAGE).rglob('*.py')):
    parts = path.relative_to(ROOT / PACKAGE).with_suffix('').parts
    name = '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)
    found[name] = ast.parse(path.read_text(encoding='utf-8'), str(path))
  return found


def imports(tree):
  """Full names of all that a module imports, inside functions too: 'numpy', 'qalora_jax.quant.affine'."""
  names = set()
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f'line {node.lineno}: a relative import; write it out'
      names |= {f'{node.module}.{alias.name}' for alias in node.names}
  return names


def edges():
  """{'kernels.qmatmul': {'quant.qtensor', ...}, ...} within the package."""
  found = modules()
  graph = {}
  for name, tree in found.items():
    inner = {target.removeprefix(f'{PACKAGE}.') for target in imports(tree) if target.startswith(f'{PACKAGE}.')}
    # `from qalora_jax import quant` names a module; `from qalora_jax.quant import rank` a thing inside one.
    graph[name] = {target if target in found else target.rpartition('.')[0] for target in inner} - {name, ''}
  return graph


def layer(name):
  """The index in LAYERS of the longest name that `name` is or lies below."""
  fits = [
    (len(known), index)
    for index, names in enumerate(LAYERS)
    for known in names
    if name == known or name.startswith(f'{known}.')
  ]
  assert fits, f'{PACKAGE}/{name.replace(".", "/")} has no place in LAYERS'
  return max(fits)[1]


def tops(tree):
  return {name.partition('.')[0] for name in imports(tree)}


def test_imports_flow_one_way():
  wrong = [
    f'{name} imports {target}'
    for name, targets in edges().items()
    for target in targets
    if name and layer(target) > layer(name)
  ]
  assert not wrong


def test_no_cycles():
  graph = edges()
  done = set()

  def visit(name, path):
    assert name not in path, ' -> '.join([*path[path.index(name) :], name])
    if name not in done:
      for target in graph.get(name, ()):
        visit(target, [*path, name])
      done.add(name)

  for name in graph:
    visit(name, [])


def test_the_config_stops_at_the_commands():
  graph = edges()
  for name, tree in modules().items():
    if name not in DOORS:
      assert 'ml_collections' not in tops(tree), f'{name} imports ml_collections'
      assert 'config' not in graph[name], f'{name} imports {PACKAGE}.config'


def test_the_mathematics_needs_only_jax():
  for name, tree in modules().items():
    if name.partition('.')[0] in PURE:
      assert not tops(tree) & NOT_PURE, f'{name} imports {tops(tree) & NOT_PURE}'


def test_nothing_is_pickled():
  for name, tree in modules().items():
    assert not tops(tree) & {'pickle', 'cloudpickle', 'dill', 'joblib'}, name


def test_every_module_has_a_noun():
  assert not [name for name in modules() if NO_NOUN & set(name.split('.'))]

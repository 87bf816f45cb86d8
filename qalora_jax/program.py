"""The training program: what `qalora train` runs and `qalora plan` compiles, from a config and a mesh.

Nothing large is made here: every array is a shape, a dtype and where it lies.
"""

from collections.abc import Callable
import dataclasses
import functools

from flax import linen as nn
import jax
import ml_collections
import optax

from qalora_jax import build
from qalora_jax import families
from qalora_jax import objectives
from qalora_jax import optim
from qalora_jax import sharding
from qalora_jax import step as step_lib
from qalora_jax import topologies

# The keys of config.optim that `optim.adamw` takes.
_ADAMW = ('clip', 'beta1', 'beta2', 'eps', 'weight_decay', 'state', 'offload')


@dataclasses.dataclass(frozen=True)
class Program:
  """A jitted training step, and what it takes.

  `step(state, frozen, batch) -> (state, metrics)` donates the state.  `state`, `frozen` and `batch` are abstract
  arguments, each leaf with its sharding.  `rate` is the learning rate by step; `objective` what is made small.
  """

  mesh: jax.sharding.Mesh
  rate: Callable
  tx: optax.GradientTransformation
  step: jax.stages.Wrapped
  state: step_lib.State
  frozen: dict
  batch: dict
  objective: objectives.Objective

  @property
  def arguments(self) -> tuple:
    """What `step` takes, abstract."""
    return self.state, self.frozen, self.batch

  def compiled(self, platform: str, *, quick: bool = False) -> jax.stages.Compiled:
    """The step compiled for the mesh's devices, which need not be here; as `topologies.compiled_for`."""
    return topologies.compiled_for(platform, self.step, *self.arguments, quick=quick)

  def begin(self, params: dict) -> step_lib.State:
    """The state before the first step, on the mesh; `params` are donated."""
    make = functools.partial(step_lib.init_state, self.tx)
    return jax.jit(make, out_shardings=shardings(self.state), donate_argnums=0)(params)


def make(config: ml_collections.ConfigDict, built: build.Setup, mesh: jax.sharding.Mesh) -> Program:
  """The program that trains `built` on `mesh` as the config says.

  Raises ValueError where rows do not divide over the devices, or a weight does not over its axis.
  """
  sharding.check_rows(config.train.batch, config.train.accumulation, mesh)
  rate = optim.schedule(
    config.optim.schedule,
    learning_rate=config.optim.learning_rate,
    steps=config.train.steps,
    warmup_steps=config.optim.warmup_steps,
    end_fraction=config.optim.end_fraction,
  )
  tx = optim.adamw(rate, **{key: config.optim[key] for key in _ADAMW})
  boxed = jax.eval_shape(functools.partial(step_lib.init_state, tx), built.abstract['params'])
  at_state = sharding.place(boxed, mesh, config.sharding.fallback)
  state = _placed(boxed, optim.on_host(at_state) if config.optim.offload else at_state)
  frozen = built.abstract['frozen']
  frozen = _placed(frozen, sharding.place(frozen, mesh, config.sharding.fallback))
  rows = sharding.batch(mesh)
  objective = families.objective(built.model.config)
  widths = objective.widths(config.data.window, config.data.max_completion)
  step = functools.partial(
    step_lib.train_step, built.model, tx, config.seed, config.train.accumulation, objective=objective
  )
  return Program(
    mesh=mesh,
    rate=rate,
    tx=tx,
    step=jax.jit(
      sharding.over(mesh, step),
      in_shardings=(shardings(state), shardings(frozen), rows),
      out_shardings=(shardings(state), sharding.replicated(mesh)),
      donate_argnums=0,  # the state; never the frozen weights
    ),
    state=state,
    frozen=frozen,
    batch={
      name: jax.ShapeDtypeStruct((config.train.batch, widths[name]), dtype, sharding=rows)
      for name, dtype in objective.arrays.items()
    },
    objective=objective,
  )


def shardings(tree):
  """The sharding of every leaf."""
  return jax.tree.map(lambda leaf: leaf.sharding, tree)


def _placed(boxed, at):
  """An abstract tree out of its boxes, each leaf with its sharding in `at`."""
  place = lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
  return jax.tree.map(place, nn.unbox(boxed), at)

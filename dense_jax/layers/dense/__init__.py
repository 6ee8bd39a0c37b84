"""Dense hidden connections (arXiv 2403.00818, section 3), one class for each part.

`NoConnection` is the base layer. `InputInjection` is equation (5). `StateInjection` is equations
(3) and (4), with the `Transition` phi of each source and one fusion of `FUSIONS`. `FusedStates` is
the chain of states that deeper layers read if the source is "fused".
"""

from collections.abc import Mapping

from flax import nnx

from dense_jax.config import ModelConfig, invalid
from dense_jax.layers.dense.connection import Connection, NoConnection
from dense_jax.layers.dense.input_injection import InputInjection
from dense_jax.layers.dense.state_injection import StateInjection
from dense_jax.layers.dense.transition import ReadShape


def make_connection(
    config: ModelConfig,
    *,
    sources: int,
    inputs: Mapping[str, tuple[int, str | None]],
    query: tuple[int, ...],
    channels: int,
    form: str,
    fixed_query: bool = False,
    rngs: nnx.Rngs,
) -> Connection:
  """Makes the connection of one layer.

  Args:
    config: the model.
    sources: S, the layers that are read: m, or fewer near the model's input; 0 means none.
    inputs: name -> (width, logical axis) of the recurrence's inputs, for injection "inputs";
      empty means that the family has none that depend on the token.
    query: trailing shape of the mixer's query, (N,) or (J, N).
    channels: E, the width of a read.
    form: the form of the mixer's state, a key of `resolver.IMPLEMENTATIONS`.
    fixed_query: true if the query is a parameter [E, N] instead of a function of the token.
    rngs: for the parameters.

  Raises:
    InputError: the injection is "inputs" and `inputs` is empty.
  """
  inject = config.dense.inject
  if not sources:
    return NoConnection(inject)
  if inject == "state":
    return StateInjection(config, ReadShape(sources, query, channels, fixed_query), rngs)
  if not inputs:
    raise invalid(
        "config.model.dense.inject", inject,
        f"state with family={config.family}, whose state has no inputs made by the token",
    )
  return InputInjection(config, sources=sources, inputs=inputs, form=form, rngs=rngs)

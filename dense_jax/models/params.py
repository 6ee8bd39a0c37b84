"""Parameters as one flat dict, and models made from them.

Training, checkpoints, sharding and interop see a model as its definition (static) and
`Params`: dotted path -> array, such as ``stack.head.0.mixer.in_proj.kernel``.
"""

import dataclasses
from typing import Any

import jax
from flax import nnx

from dense_jax.config import ModelConfig
from dense_jax.layers.linear import Axes
from dense_jax.layers.stack import block_sizes, pattern_length
from dense_jax.models.language_model import LanguageModel
from dense_jax.types import Array, Params


def _dotted(path: tuple[Any, ...]) -> str:
  return ".".join(str(part) for part in path)


def get_params(model: LanguageModel) -> Params:
  """The model's parameters."""
  return {_dotted(path): leaf.get_value() for path, leaf in nnx.to_flat_state(nnx.state(model))}


def abstract_model(config: ModelConfig) -> LanguageModel:
  """The model with shapes for parameters: nothing is computed or stored."""
  return nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))


def logical_axes(model: LanguageModel) -> dict[str, Axes]:
  """The logical axes of each parameter; stacked ones begin with "layers"."""
  axes = {}
  for path, leaf in nnx.to_flat_state(nnx.state(model)):
    names = leaf.get_metadata()["axes"]
    stacked = leaf.get_value().ndim - len(names)
    axes[_dotted(path)] = ("layers",) * stacked + names
  return axes


def with_params(model: LanguageModel, params: Params) -> LanguageModel:
  """A model like `model` (abstract or not) that holds `params`.

  Raises:
    ValueError: `params` has not exactly the model's paths.
  """
  graph, state = nnx.split(model)
  flat = dict(nnx.to_flat_state(state))
  names = {path: _dotted(path) for path in flat}
  if set(names.values()) != set(params):
    different = sorted(set(names.values()) ^ set(params))
    raise ValueError(f"parameters that only one side has: {', '.join(different)}")
  leaves = {path: leaf.replace(params[names[path]]) for path, leaf in flat.items()}
  return nnx.merge(graph, nnx.from_flat_state(leaves))


def init_params(config: ModelConfig, key: Array) -> Params:
  """Fresh parameters; jit it, with shardings if they are to start out sharded."""
  return get_params(LanguageModel(config, rngs=nnx.Rngs(key)))


def unrolled(model: LanguageModel) -> LanguageModel:
  """The same function with every layer compiled apart: how decoding runs."""
  head, block, blocks = block_sizes(model.config)
  pattern = pattern_length(model.config)
  if not blocks:
    return model
  params = {}
  for name, value in get_params(model).items():
    if not name.startswith("stack.blocks."):
      params[name] = value
      continue
    _, _, index, rest = name.split(".", 3)
    for repeat in range(blocks * block // pattern):
      layer = head + repeat * pattern + int(index)
      params[f"stack.head.{layer}.{rest}"] = value[repeat]
  config = dataclasses.replace(model.config, block_layers=model.config.layers)
  return with_params(abstract_model(config), params)


def count_params(params: Params) -> int:
  """Numbers in all parameters."""
  return sum(leaf.size for leaf in jax.tree.leaves(params))

"""Parameters as one flat dict, and models made from them.

Training, checkpoints, sharding and interop see a model as its definition (static) and `Params`:
name -> array. There are two ways to name a layer's parameters:

    scanned     stack.prefix_layers.0.mixer.a_log       a layer compiled apart
                stack.scanned_layers.1.mixer.a_log      layers of one kind, stacked [R, ...]
    by layer    layers.7.mixer.a_log                    each layer by itself

A model itself uses the first way, which depends on `block_layers`; `by_layer` and `as_scanned`
convert. Everything that is stored or exchanged (checkpoints, `save_hf`, reports) uses the second.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from dense_jax.config import ModelConfig
from dense_jax.layers.linear import Axes, Linear
from dense_jax.layers.stack import plan_layers
from dense_jax.models.language_model import LanguageModel
from dense_jax.types import Array, Params, PyTree

Split = Callable[[Any, int], Sequence[Any]]
Join = Callable[[Sequence[Any]], Any]

# A parameter of the stack by its two names.
_SCANNED = re.compile(r"stack\.(prefix_layers|scanned_layers)\.(\d+)\.(.+)")
_BY_LAYER = re.compile(r"layers\.(\d+)\.(.+)")


def _dotted(path: tuple[Any, ...]) -> str:
  return ".".join(str(part) for part in path)


def get_params(model: LanguageModel) -> Params:
  """Returns the model's parameters, under the names that the model uses."""
  return {_dotted(path): leaf.get_value() for path, leaf in nnx.to_flat_state(nnx.state(model))}


def decoding_params(model: LanguageModel) -> Params:
  """Returns the model's parameters, its large matrices in the dtype that they are multiplied in.

  These are the embedding, the head and the kernels of linear maps, which the model would round to
  `config.dtype` at each use. A loop over tokens then reads half of the bytes if that is bfloat16,
  and computes the same numbers. Reading a prompt in parallel does so but where a norm's scale is
  part of a kernel (`Linear.of_scaled`), which is then rounded before and after. For decoding alone:
  gradients would be rounded too.
  """
  kernels = {
      (*path, "kernel") for path, module in nnx.iter_graph(model) if isinstance(module, Linear)
  }
  names = {"embedding", "head", *map(_dotted, kernels)}
  return {
      name: leaf.astype(model.dtype) if name in names else leaf
      for name, leaf in get_params(model).items()
  }


def abstract_model(config: ModelConfig) -> LanguageModel:
  """Returns the model with shapes in place of parameters: nothing is computed or stored."""
  return nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))


def logical_axes(model: LanguageModel) -> dict[str, Axes]:
  """Returns the logical axes of each parameter; those of stacked parameters begin with "layers"."""
  axes = {}
  for path, leaf in nnx.to_flat_state(nnx.state(model)):
    names = leaf.get_metadata()["axes"]
    stacked = leaf.get_value().ndim - len(names)
    axes[_dotted(path)] = ("layers",) * stacked + names
  return axes


def with_params(model: LanguageModel, params: Params) -> LanguageModel:
  """Returns a model like `model` (abstract or not) that holds `params`.

  Raises:
    ValueError: the names of `params` are not exactly those of the model.
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
  """Makes fresh parameters; under jit with out_shardings, they are sharded from the start."""
  return get_params(LanguageModel(config, rngs=nnx.Rngs(key)))


def is_stacked(path: tuple[Any, ...]) -> bool:
  """Returns whether a path of jax.tree_util leads to a parameter of several layers, [R, ...]."""
  names = (getattr(key, "key", None) for key in path)
  found = (_SCANNED.fullmatch(name) for name in names if isinstance(name, str))
  return any(match and match[1] == "scanned_layers" for match in found)


def by_layer(config: ModelConfig, tree: PyTree, *, split: Split | None = None) -> PyTree:
  """Gives each layer its own entry, in every dict of parameters that a tree holds.

  Args:
    config: the model's configuration, which says how its layers are scanned.
    tree: `Params`, or a tree that contains such dicts, like the state of an optimizer. Leaves are
      arrays or ShapeDtypeStructs.
    split: splits a stacked leaf into the parts of its R layers; None means `split_rows`.

  Returns:
    The tree with names `layers.<N>.<rest>` for the stack's parameters, and all else unchanged.
  """
  plan = plan_layers(config)

  def convert(params: dict[str, Any]) -> dict[str, Any]:
    converted = {}
    for name, value in params.items():
      match = _SCANNED.fullmatch(name)
      if match is None:
        converted[name] = value
      elif match[1] == "prefix_layers":
        converted[f"layers.{match[2]}.{match[3]}"] = value
      else:
        layers = plan.layers(int(match[2]))
        parts = (split or split_rows)(value, len(layers))
        for layer, part in zip(layers, parts, strict=True):
          converted[f"layers.{layer}.{match[3]}"] = part
    return converted

  return _map_dicts(_SCANNED, convert, tree)


def as_scanned(config: ModelConfig, tree: PyTree, *, stack: Join | None = None) -> PyTree:
  """Inverts `by_layer`: names and stacks parameters as the model of `config` does.

  The tree may come from a model of the same layers that was scanned in another way.

  Args:
    config: the model's configuration, which says how its layers are to be scanned.
    tree: a tree as `by_layer` returns it.
    stack: joins the parts of R layers to one leaf; None means `stack_rows`.
  """
  plan = plan_layers(config)

  def convert(params: dict[str, Any]) -> dict[str, Any]:
    converted = {}
    for name, value in params.items():
      match = _BY_LAYER.fullmatch(name)
      if match is None:
        converted[name] = value
        continue
      layer, rest = int(match[1]), match[2]
      row, position = divmod(layer - plan.prefix, plan.pattern or 1)
      if layer < plan.prefix:
        converted[f"stack.prefix_layers.{layer}.{rest}"] = value
      elif row == 0:
        parts = [params[f"layers.{other}.{rest}"] for other in plan.layers(position)]
        converted[f"stack.scanned_layers.{position}.{rest}"] = (stack or stack_rows)(parts)
    return converted

  return _map_dicts(_BY_LAYER, convert, tree)


def _map_dicts(
    name: re.Pattern[str], convert: Callable[[dict[str, Any]], dict[str, Any]], tree: PyTree
) -> PyTree:
  """Converts each dict in a tree that has a key which matches `name`."""

  def is_params(node: Any) -> bool:
    return isinstance(node, dict) and any(
        isinstance(key, str) and name.fullmatch(key) for key in node
    )

  return jax.tree.map(
      lambda node: convert(node) if is_params(node) else node, tree, is_leaf=is_params
  )


def split_rows(leaf: Any, rows: int) -> list[Any]:
  """Splits an array or shape [R, ...] into R; a shape's sharding becomes that of a row."""
  if not isinstance(leaf, jax.ShapeDtypeStruct):
    return [leaf[row] for row in range(rows)]
  placed = row_sharding(leaf.sharding)
  return [jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=placed)] * rows


def stack_rows(leaves: Sequence[Any]) -> Any:
  """Inverts `split_rows`."""
  first = leaves[0]
  if not isinstance(first, jax.ShapeDtypeStruct):
    return jnp.stack(leaves)
  placed = stacked_sharding(first.sharding)
  return jax.ShapeDtypeStruct((len(leaves), *first.shape), first.dtype, sharding=placed)


def row_sharding(placed: Any) -> Any:
  """Returns the sharding of a row of an array [R, ...] with sharding `placed` (or None)."""
  if not isinstance(placed, NamedSharding):
    return placed
  spec = PartitionSpec(*placed.spec[1:])
  return NamedSharding(placed.mesh, spec, memory_kind=placed.memory_kind)


def stacked_sharding(placed: Any) -> Any:
  """Inverts `row_sharding`."""
  if not isinstance(placed, NamedSharding):
    return placed
  spec = PartitionSpec(None, *placed.spec)
  return NamedSharding(placed.mesh, spec, memory_kind=placed.memory_kind)


def unrolled_config(config: ModelConfig) -> ModelConfig:
  """Returns the configuration of the same model with every layer compiled apart."""
  return dataclasses.replace(config, block_layers=config.layers)


def unrolled(model: LanguageModel) -> LanguageModel:
  """Returns the same function with every layer compiled apart, as decoding runs it."""
  if not model.stack.scanned_layers:
    return model
  config = unrolled_config(model.config)
  params = as_scanned(config, by_layer(model.config, get_params(model)))
  return with_params(abstract_model(config), params)


def count_params(params: Params) -> int:
  """Returns the number of scalars in all parameters."""
  return sum(leaf.size for leaf in jax.tree.leaves(params))

"""Begins a model with the parameters of another that has fewer dense connections.

The new model computes the old one's function. Parameters that both have are copied, layer by layer,
and what is new starts closed: reads that the old model does not have are multiplied by zero, and
maps that it does not have are the identity.

    what is new                              how it starts
    reads with a gate of channels            the gate's last matrix is zero: phi(h) = 0
    reads without one, fusion=concat         their maps W_i are zero
    reads without one, transition=linear     their maps W are zero
    reads without one, fusion=gated          z = 0, in layers that read nothing before
    transition=linear or mlp, fusion=concat  W and W_i are the identity, U is zero
    gate=channel_state                       the state gate's last matrix is zero: g_N = 1
    gate_sharing=per_source                  each source's gate is the shared one

What has no such start is refused by the name of its key. Everything that is closed learns, because
the gradient of the closing factor is not zero.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence

import jax.numpy as jnp

from dense_jax.config import DenseConfig, ModelConfig, defaults, invalid
from dense_jax.errors import InputError
from dense_jax.layers.dense.gate import bottleneck
from dense_jax.models.params import abstract_model, as_scanned, by_layer, get_params
from dense_jax.types import Array, Params

_DENSE = ".mixer.dense."
# Keys of a model that may differ: how it is computed, and how fresh parameters are drawn.
_ANY = frozenset({
    "dtype", "state_dtype", "block_layers", "remat", "implementation", "chunk", "mixer.dt_min",
    "mixer.dt_max", "mixer.dt_floor", "mixer.init",
})
# Keys that are only sizes of parameters, with a default that is written as 0.
_SIZES = frozenset(f"mixer.{key}" for key in (
    "dt_rank", "key_dim", "ffn_width", "head_dim", "kv_heads"))
_GATE = re.compile(r"(.+_gates|gates\.\w+)\.(\d+)\.(down|up)\.kernel")


def warm_start(
    source: ModelConfig, target: ModelConfig, params: Params, fresh: Params
) -> Params:
  """Returns parameters with which the model of `target` computes what that of `source` does.

  Args:
    source: the configuration of the model to begin with.
    target: the configuration of the model that begins.
    params: the source's parameters, under the names that its model uses.
    fresh: initial values of the target's parameters, likewise.

  Returns:
    The target's parameters, under the names that its model uses. They may be traced by jit.

  Raises:
    InputError: the target cannot begin as the source; see `check_warm_start`.
  """
  check_warm_start(source, target)
  old, new = by_layer(source, params), by_layer(target, fresh)
  started = {
      name: old[name] if _DENSE not in name else _connection(source, target, old, new, name)
      for name in new
  }
  return as_scanned(target, started)


def new_parameters(source: ModelConfig, target: ModelConfig) -> tuple[int, int]:
  """Returns how many numbers a warm start copies, and how many of the target's are new."""
  old, new = (by_layer(c, get_params(abstract_model(c))) for c in (source, target))
  copied = sum(min(leaf.size, old[name].size) for name, leaf in new.items() if name in old)
  return copied, sum(leaf.size for leaf in new.values()) - copied


def check_warm_start(source: ModelConfig, target: ModelConfig) -> None:
  """Checks that the model of `target` can compute what that of `source` does.

  Raises:
    InputError: the models differ in more than dense connections (the error lists all differences);
      reads would be lost; or a new part has no start that changes nothing (the error names its key
      and what would be valid).
  """
  _check_same_model(source, target)
  layers = range(target.layers)
  reading = [layer for layer in layers if source.dense.sources(layer)]
  for layer in reading:
    before, now = source.dense.layers_read(layer), target.dense.layers_read(layer)
    if now[: len(before)] != before:
      raise InputError(
          f"config.model.dense (depth = {target.dense.depth}, reads = {target.dense.reads}, start "
          f"= {target.dense.start}, stride = {target.dense.stride}) is not valid: layer {layer} "
          f"would read layers {_listed(now)}, and reads {_listed(before)} in the model to begin "
          f"with. Expected depth >= {source.dense.depth}, reads = {source.dense.reads}, start = "
          f"{source.dense.start} and stride = {source.dense.stride}, or others with which each "
          "layer keeps its sources"
      )
  if reading:
    _check_kept(source, target)
  for layer in layers:
    if target.dense.sources(layer) > source.dense.sources(layer):
      _check_new(target.dense, new_layer=not source.dense.sources(layer))


def _listed(layers: Sequence[int]) -> str:
  return ", ".join(map(str, layers)) or "none"


def _check_same_model(source: ModelConfig, target: ModelConfig) -> None:
  """Checks all keys outside of `dense`, and lists those that differ."""
  old, new = (_keys(config) for config in (source, target))
  same_shapes = target.family == source.family and _base_shapes(source) == _base_shapes(target)
  differing = [
      key for key in sorted(old.keys() | new.keys())
      if old.get(key) != new.get(key) and key not in _ANY
      and not (key in _SIZES and same_shapes)
  ]
  if "family" in differing:
    differing = ["family"]  # The others follow from it.
  if differing:
    lines = "\n".join(
        f"  config.model.{key}: it has {old.get(key)!r}, now {new.get(key)!r}" for key in differing
    )
    flags = " ".join(f"--config.model.{key}={_typed(old.get(key))}" for key in differing)
    raise InputError(
        f"the model to begin with differs in more than dense connections:\n{lines}\n"
        f"Expected {flags}"
    )


def _typed(value: object) -> str:
  return str(value).lower() if isinstance(value, bool) else str(value)


def _keys(config: ModelConfig) -> dict[str, object]:
  values = defaults(config)
  mixer = {f"mixer.{key}": value for key, value in (values.pop("mixer") or {}).items()}
  values.pop("dense")
  return values | mixer


def _base_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
  params = by_layer(config, get_params(abstract_model(config)))
  return {name: leaf.shape for name, leaf in params.items() if _DENSE not in name}


def _check_kept(source: ModelConfig, target: ModelConfig) -> None:
  """Checks that the reads that the source has can stay what they are."""
  old, new = source.dense, target.dense
  valid: dict[str, tuple[object, ...]] = {"inject": (old.inject,), "source": (old.source,)}
  if old.inject == "inputs":
    valid |= {"gate": (old.gate,), "input_norm": (old.input_norm,)}
  else:
    more_gates = ("channel", "channel_state") if old.gate == "channel" else (old.gate,)
    more_maps = ("identity", "linear", "mlp") if old.transition == "identity" else (
        old.transition,)
    more_fusions = ("add", "concat") if old.fusion == "add" else (old.fusion,)
    valid |= {"gate": more_gates, "transition": more_maps, "fusion": more_fusions}
    if old.transition == new.transition == "mlp":
      valid["transition_rank"] = (old.transition_rank,)
  if old.gate != "none" or old.fusion in ("gated", "attention"):
    ranks_agree = bottleneck(source) == bottleneck(target)
    valid["gate_reduction"] = (new.gate_reduction if ranks_agree else old.gate_reduction,)
  for key, options in valid.items():
    if getattr(new, key) not in options:
      raise _refused(new, key, " or ".join(map(_typed, options)), "which keeps the reads that the "
                     "model to begin with has")
  several = old.depth > 1 and any(old.sources(layer) > 1 for layer in range(source.layers))
  if old.gate_sharing == "per_source" and new.gate_sharing == "shared" and several:
    raise _refused(new, "gate_sharing", "per_source", "as in the model to begin with")


def _check_new(dense: DenseConfig, *, new_layer: bool) -> None:
  """Checks that the reads that a layer gets can start closed.

  Args:
    dense: the target's connections.
    new_layer: whether the layer reads nothing in the source.
  """
  if dense.inject == "inputs":
    if dense.gate == "none":
      raise _refused(dense, "gate", "channel", "which starts closed")
    if new_layer and dense.input_norm:
      raise _refused(dense, "input_norm", "false", "as the norm would change what enters a layer "
                     "that had none")
  if dense.fusion == "attention" and not new_layer:
    raise _refused(dense, "depth", "that of the model to begin with, with fusion=attention", "as "
                   "one more source changes the weights of all")
  if _closing(dense, new_layer) or (dense.fusion == "gated" and new_layer):
    return
  if dense.gate != "none":
    valid = "per_source" + ("" if dense.inject == "inputs" else ", or transition=linear")
    why = "as a gate that sources share is open where the nearer ones use it"
    raise _refused(dense, "gate_sharing", valid, why)
  raise _refused(dense, "gate", "channel or channel_state, or transition=linear, or fusion=concat",
                 "one of which starts closed")


def _refused(dense: DenseConfig, key: str, valid: str, why: str) -> InputError:
  return invalid(
      f"config.model.dense.{key}", getattr(dense, key), f"{valid} in a warm start, {why}"
  )


def _closing(dense: DenseConfig, new_layer: bool) -> str:
  """Returns the part that closes new sources: "gate", "fusion" or "transition"; "" if none can."""
  if dense.gate != "none" and (new_layer or dense.gate_sharing == "per_source"):
    return "gate"
  if dense.fusion == "concat":
    return "fusion"
  return "transition" if dense.transition == "linear" else ""


@dataclasses.dataclass(frozen=True)
class _Layer:
  """A layer's connection in both models.

  Attributes:
    old: the source's parameters of the connection; empty if the layer reads nothing there.
    before, now: S, the sources in either model.
    closing: see `_closing`.
  """

  old: Mapping[str, Array]
  before: int
  now: int
  closing: str


def _connection(
    source: ModelConfig, target: ModelConfig, old: Params, new: Params, name: str
) -> Array:
  """Returns one parameter of a layer's dense connection."""
  prefix, _, part = name.partition(_DENSE)
  prefix += _DENSE
  index = int(prefix.split(".")[1])
  before = source.dense.sources(index)
  layer = _Layer(
      {key.removeprefix(prefix): value for key, value in old.items() if key.startswith(prefix)},
      before, target.dense.sources(index), _closing(target.dense, not before),
  )
  fresh = new[name]
  if _GATE.fullmatch(part):
    return _gate(layer, part, fresh)
  if part in ("transition.linear", "transition.down", "transition.up"):
    closed = part == "transition.linear" and layer.closing == "transition"
    return _rows(layer, part, fresh, layer.before, closed)
  if part == "fusion.linear":
    return _rows(layer, part, fresh, 1 + layer.before, layer.closing == "fusion")
  if part in layer.old:
    return layer.old[part]
  # A gated fusion's own gate; other parts, whose value does not matter here, stay fresh.
  return jnp.zeros_like(fresh) if part == "fusion.gate.up.kernel" else fresh


def _gate(layer: _Layer, part: str, fresh: Array) -> Array:
  """Returns a matrix of a gate: the source's own, or one of a gate that is zero."""
  match = _GATE.fullmatch(part)
  assert match
  gates, number, matrix = match[1], int(match[2]), match[3]
  if number < layer.before:
    shared = f"{gates}.1.{matrix}.kernel" not in layer.old
    before = f"{gates}.{0 if shared else number}.{matrix}.kernel"
    if before in layer.old:
      return layer.old[before]
  return jnp.zeros_like(fresh) if matrix == "up" else fresh


def _rows(layer: _Layer, part: str, fresh: Array, before: int, closed: bool) -> Array:
  """Returns an array with a row for each source: old rows as they were, new ones fresh or zero."""
  first = layer.old.get(part, fresh[:before])
  rest = fresh[before:]
  return jnp.concatenate([first, jnp.zeros_like(rest) if closed else rest])

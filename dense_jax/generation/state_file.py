"""Files that hold a prefix: a text of any length, as a model has read it, in constant size.

A safetensors file, written atomically, with one tensor for each part of a `Prefix`:

    position          int32 [1]
    layers.<N>.<name> [1, ...], each part of a mixer's state: float32, or the bits of bfloat16
                      numbers as uint16
    logits            float32 [V]
    seen              uint8 [ceil(V / 8)], the bits of `seen_V`
    last_ids          int32

and in its metadata: `format` and `version`; `model`, a name for people; `config`, the keys of
`config.model` that define the function, as JSON; `params` and `tokenizer`, fingerprints; and
`digest`, of all the rest. The file is of no use to another model, and it is refused there.
"""

import functools
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dense_jax.config import defaults, invalid
from dense_jax.data.tokenizer import Tokenizer
from dense_jax.files import make_path, parse_json, write_atomically
from dense_jax.generation.requests import Prefix
from dense_jax.generation.text import CONTEXT
from dense_jax.models.language_model import LanguageModel, ModelState
from dense_jax.models.params import abstract_model, by_layer, get_params, unrolled_config
from dense_jax.types import Array, PyTree

_FORMAT, _VERSION = "dense_jax state", "1"
# The keys of a model's configuration that change how it is computed, but not the function.
_FREE = ("implementation", "chunk", "remat", "block_layers", "state_dtype")


class StateFiles:
  """Writes and reads the prefixes of one model with its tokenizer."""

  def __init__(self, name: str, model: LanguageModel, tokenizer: Tokenizer) -> None:
    """Prepares; `name` says in messages which model it is."""
    self._name, self._model, self._tokenizer = name, model, tokenizer

  @functools.cached_property
  def _identity(self) -> dict[str, str]:
    config = defaults(self._model.config)
    values = {key: value for key, value in config.items() if key not in _FREE}
    return {
        "format": _FORMAT, "version": _VERSION, "model": self._name,
        "config": json.dumps(values, sort_keys=True), "params": params_fingerprint(self._model),
        "tokenizer": self._tokenizer.fingerprint,
    }

  def save(self, prefix: Prefix, path: str, field: str) -> None:
    """Writes a prefix.

    Args:
      prefix: the prefix.
      path: the file, which is replaced if it exists; its folder is made.
      field: the option that named the file, for error messages.

    Raises:
      InputError: the file cannot be written.
    """
    from safetensors.flax import save

    tensors = {
        **_named(prefix.state), "logits": prefix.logits_V,
        "seen": jnp.asarray(np.packbits(np.asarray(prefix.seen_V))),
        "last_ids": jnp.asarray(prefix.last_ids, jnp.int32),
    }
    metadata = self._identity | {"digest": _digest(tensors, self._identity)}
    file = make_path(path, field)
    try:
      file.parent.mkdir(parents=True, exist_ok=True)
      write_atomically(file, save(tensors, metadata))
    except OSError as error:
      raise invalid(field, path, f"a file that can be written ({error.strerror})") from error

  def load(self, path: str, field: str) -> Prefix:
    """Reads a prefix.

    Args:
      path: a file that `save` wrote for this model.
      field: the option that named the file, for error messages.

    Raises:
      InputError: there is no such file, it is damaged, holds something else, or is of another
        model or tokenizer.
    """
    tensors, metadata = _read(path, field)
    if metadata.get("format") != _FORMAT or metadata.get("version") != _VERSION:
      raise invalid(field, path, f"a file that --save-state wrote, version {_VERSION}")
    identity = {key: metadata.get(key, "") for key in self._identity}
    if metadata.get("digest") != _digest(tensors, identity):
      raise invalid(field, path, "a whole state file; its content is damaged")
    self._check_model(identity, path, field)
    vocabulary = self._model.config.vocab_size
    return Prefix(
        _from_named(self._state_shapes(), tensors), tensors["logits"],
        jnp.asarray(np.unpackbits(np.asarray(tensors["seen"]), count=vocabulary).astype(bool)),
        tuple(np.asarray(tensors["last_ids"]).tolist())[-CONTEXT:],
    )

  def _state_shapes(self) -> ModelState:
    model = abstract_model(unrolled_config(self._model.config))
    return jax.eval_shape(lambda: model.init_state(1))

  def _check_model(self, theirs: Mapping[str, str], path: str, field: str) -> None:
    """Refuses the state of another model or tokenizer."""
    ours = self._identity
    if theirs["config"] != ours["config"]:
      old, new = _flat(parse_json(theirs["config"])), _flat(parse_json(ours["config"]))
      keys = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
      why = "; ".join(f"{key} is {old.get(key)!r}, here {new.get(key)!r}" for key in keys[:5])
    elif theirs["params"] != ours["params"]:
      why = "its parameters are others"
    elif theirs["tokenizer"] != ours["tokenizer"]:
      why = "its tokenizer is another"
    else:
      return
    raise invalid(
        field, path, f"a state of {self._name}; it is one of {theirs['model']}: {why}"
    )


def params_fingerprint(model: LanguageModel) -> str:
  """Returns a hex digest of a model's parameters, however its layers are scanned."""
  params = by_layer(model.config, get_params(model))
  return _digest(params, {})


def _digest(tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> str:
  """Returns a digest of names, shapes, dtypes and content."""
  result = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
  for name in sorted(tensors):
    array = np.asarray(tensors[name])
    result.update(f"\0{name} {array.dtype} {array.shape}\0".encode())
    result.update(np.ascontiguousarray(array).view(np.uint8).reshape(-1).data)
  return result.hexdigest()


def _named(state: ModelState) -> dict[str, Any]:
  """Returns the parts of a state by name."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(state.layers)
  return {"position": state.position_B} | {
      # Not all that reads safetensors knows bfloat16.
      _name(path): leaf.view(jnp.uint16) if leaf.dtype == jnp.bfloat16 else leaf
      for path, leaf in leaves
  }


def _from_named(shapes: ModelState, tensors: Mapping[str, Any]) -> ModelState:
  """Inverts `_named`; recurrences' states get the dtype that the model keeps them in."""
  def restored(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> Array:
    tensor = tensors[_name(path)]
    tensor = tensor.view(jnp.bfloat16) if tensor.dtype == jnp.uint16 else tensor
    return tensor.astype(leaf.dtype)

  layers: PyTree = jax.tree_util.tree_map_with_path(restored, shapes.layers)
  return ModelState(tensors["position"], layers)


def _name(path: tuple[Any, ...]) -> str:
  """Returns layers.<N>.<name> for the path of a leaf in a state whose layers are unrolled."""
  _, layer, *rest = path
  return ".".join(["layers", str(layer.idx), *(part.name for part in rest)])


def _read(path: str, field: str) -> tuple[dict[str, Any], dict[str, str]]:
  """Reads tensors and metadata of a safetensors file."""
  from safetensors import SafetensorError
  from safetensors.flax import load

  file = make_path(path, field)
  try:
    content = file.read_bytes()
    tensors = load(content)
    size = int.from_bytes(content[:8], "little")
    metadata = parse_json(content[8 : 8 + size]).get("__metadata__", {})
  except OSError as error:
    raise invalid(field, path, f"a file to read ({error.strerror or error})") from error
  except (SafetensorError, ValueError, AttributeError, KeyError, TypeError) as error:
    raise invalid(
        field, path, f"a file that --save-state wrote; it is damaged or another ({error})"
    ) from error
  return tensors, metadata


def _flat(values: Mapping[str, Any], prefix: str = "config.model.") -> dict[str, Any]:
  flat: dict[str, Any] = {}
  for key, value in values.items():
    flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
  return flat

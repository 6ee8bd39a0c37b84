"""Reads a checkpoint's tensors from one file, or from shards through their index.

The files are not trusted: if one is damaged or malicious, an InputError names it, and an index
cannot lead outside its folder.
"""

import pathlib
from collections.abc import Collection, Mapping
from typing import Any

from dense_jax.errors import InputError
from dense_jax.files import parse_json
from dense_jax.interop.layout import shown


def read_tensors(folder: pathlib.Path) -> dict[str, Any]:
  """Reads all tensors in a checkpoint's folder, by name.

  Like transformers, reads the first of these that exists: `model.safetensors`, the shards of
  `model.safetensors.index.json`, `pytorch_model.bin`, the shards of
  `pytorch_model.bin.index.json`.

  Raises:
    InputError: none of them exists, or a file is missing or damaged; see `read_index`.
  """
  for name, read in (("model.safetensors", _safetensors), ("pytorch_model.bin", _torch)):
    index = folder / f"{name}.index.json"
    if (folder / name).is_file():
      return read(folder / name, None)
    if index.is_file():
      shards = read_index(index)
      missing = [shown(shard) for shard in shards if not (folder / shard).is_file()]
      if missing:
        raise InputError(f"{index} names files that do not exist: {', '.join(missing)}")
      return {
          key: value for shard, names in shards.items()
          for key, value in read(folder / shard, names).items()
      }
  raise InputError(
      f"{folder} has no weights: expected model.safetensors or pytorch_model.bin, or their "
      "shards with an index"
  )


def read_index(index: pathlib.Path) -> dict[str, list[str]]:
  """Reads which tensors to take from which shard.

  Args:
    index: a `*.index.json` file: an object whose `weight_map` has tensor name -> shard.

  Returns:
    Shard -> names of its tensors. Shards are paths relative to the index's folder.

  Raises:
    InputError: the file is not a valid index, gives a tensor two shards, or names a shard outside
      its folder. (A shard in the folder may be a symbolic link to anywhere, as in Hugging Face's
      cache.)
  """
  try:
    weight_map = _weight_map(index.read_bytes())
  except (OSError, ValueError) as error:
    raise InputError(
        f"{index} is not valid: expected an object with a weight_map, tensor -> file; {error}"
    ) from error
  shards: dict[str, list[str]] = {}
  for name, shard in weight_map.items():
    if not _is_inside(shard):
      raise InputError(
          f"{index} is not valid: expected files below its own folder; {shown(name)} is said to be "
          f"in {shard!r}"
      )
    shards.setdefault(shard, []).append(name)
  return dict(sorted(shards.items()))


def _weight_map(content: bytes) -> dict[str, Any]:
  """Parses an index; returns its `weight_map`.

  Raises:
    ValueError: the content is not a valid index, or its map is empty.
  """
  values = parse_json(content, _without_repetition)
  weight_map = values.get("weight_map") if isinstance(values, dict) else None
  if not isinstance(weight_map, dict) or not weight_map:
    raise ValueError("it has none")
  return weight_map


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  values: dict[str, Any] = {}
  for name, value in pairs:
    if values.setdefault(name, value) != value:
      raise ValueError(f"it has {shown(name)} twice, with different values")
  return values


def _is_inside(shard: Any) -> bool:
  """Returns whether an index's entry is a path below its folder, on any operating system."""
  if not isinstance(shard, str) or "\0" in shard:
    return False
  path = pathlib.PureWindowsPath(shard)  # Accepts / and \ as separators, and understands C:.
  return bool(path.parts) and not path.anchor and ".." not in path.parts


def _check_names(file: pathlib.Path, names: Collection[str], wanted: Collection[str]) -> None:
  lacking = [shown(name) for name in wanted if name not in names]
  if lacking:
    raise InputError(f"{file} lacks tensors that the index says it has: {', '.join(lacking)}")


def _safetensors(file: pathlib.Path, wanted: Collection[str] | None) -> dict[str, Any]:
  """Reads the wanted tensors of a file; None means all."""
  from safetensors import SafetensorError, safe_open

  try:
    with safe_open(file, framework="flax") as tensors:
      names = set(tensors.keys())
      if wanted is not None:
        _check_names(file, names, wanted)
      return {name: tensors.get_tensor(name) for name in (names if wanted is None else wanted)}
  except (SafetensorError, OSError) as error:
    raise InputError(f"{file} is not a whole safetensors file: {shown(str(error))}") from error
  except AttributeError as error:  # Raised by safetensors for a dtype that numpy does not have.
    raise InputError(f"{file} has numbers of an unknown kind: {error}") from error


def _torch(file: pathlib.Path, wanted: Collection[str] | None) -> dict[str, Any]:
  """Reads the wanted tensors of a file, as float32; None means all."""
  try:
    import torch
  except ImportError as error:
    raise InputError(
        f"{file} needs PyTorch to be read: pip install 'dense_jax[interop]', or save the "
        "model as model.safetensors"
    ) from error
  try:
    tensors = torch.load(file, map_location="cpu", weights_only=True)
  except Exception as error:  # Damaged bytes can make unpickling raise anything.
    raise InputError(f"{file} is not a file of PyTorch weights alone: {error}") from error
  if not isinstance(tensors, Mapping) or not all(isinstance(name, str) for name in tensors):
    raise InputError(f"{file} is not a file of PyTorch weights: expected tensors by name")
  if wanted is not None:
    _check_names(file, tensors.keys(), wanted)
  try:
    return {
        name: tensors[name].float().numpy() for name in (tensors if wanted is None else wanted)
    }
  except (AttributeError, RuntimeError, TypeError) as error:
    raise InputError(f"{file} has something that is no dense tensor: {error}") from error

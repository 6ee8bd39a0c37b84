"""Maps the tensors of another project's checkpoint to this project's parameters, and back.

"Ours" are this project's parameters, "theirs" the tensors of the checkpoint.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np

from dense_jax.config import ModelConfig
from dense_jax.errors import InputError
from dense_jax.types import Params

Config = Mapping[str, Any]
"""The content of a `config.json`."""


@dataclasses.dataclass(frozen=True)
class Form:
  """A pair of inverse transformations between their tensors and ours, without arithmetic."""

  to_ours: Callable[[np.ndarray], np.ndarray]
  to_theirs: Callable[[np.ndarray], np.ndarray]


PLAIN = Form(lambda x: x, lambda x: x)
# Matrices: PyTorch stores linear maps as [out, in], and Mamba's A_log is [E, N] there.
TRANSPOSED = Form(np.transpose, np.transpose)
# Depthwise convolutions: [E, 1, W] there, [W, E] here.
DEPTHWISE = Form(lambda x: x[:, 0].T, lambda x: x.T[:, None])

HEAD = "lm_head.weight"

Place = tuple[str, Form]
"""The place of a parameter in their checkpoint: the tensor's name and form. If several parameters
share a tensor, they are concatenated in it along its first axis, in their order."""


def shown(text: str) -> str:
  """Returns text from an untrusted file for an error message, escaped if it is not printable."""
  return text if text.isprintable() else repr(text)


def per_layer(table: Mapping[str, Place], prefix: str, layers: Iterable[int]) -> dict[str, Place]:
  """Expands `table`, which has the places of one layer's parameters, to all `layers`.

  Args:
    table: our parameter below `layers.<layer>` -> its place below theirs.
    prefix: the part of their names before the layer's number.
    layers: the layers' numbers.
  """
  return {
      f"layers.{layer}.{ours}": (f"{prefix}{layer}.{theirs}", form)
      for layer in layers for ours, (theirs, form) in table.items()
  }


@dataclasses.dataclass(frozen=True)
class Layout:
  """One checkpoint's layout.

  Attributes:
    config: the model that it describes.
    places: our parameter, by layer (`dense_jax.models.params`) -> where it is.
    unused: tensors that a checkpoint may or may not have, and that the model does not use.
    aliases: other names of tensors in some checkpoints -> their names in `places`. A tied head is
      another name of the embedding.
  """

  config: ModelConfig
  places: Mapping[str, Place]
  unused: frozenset[str] = frozenset()
  aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)

  def to_ours(self, tensors: Mapping[str, Any], expected: Params) -> Params:
    """Converts their tensors to float32 parameters.

    Args:
      tensors: their name -> array.
      expected: parameters of the right shapes, by layer.

    Raises:
      InputError: tensors are missing, extra, of another shape, not floating-point, or different
        from another tensor that should be equal; the error lists them all.
    """
    tensors, problems = self._by_one_name(tensors)
    names = {theirs for theirs, _ in self.places.values()}
    problems += [f"missing: {name}" for name in sorted(names - tensors.keys())]
    problems += [f"extra: {shown(name)}" for name in sorted(tensors.keys() - names - self.unused)]
    params = {}
    for theirs, parts in self._tensors().items():
      if theirs not in tensors:
        continue
      value = np.asarray(tensors[theirs])
      try:
        shapes = [
            form.to_theirs(np.broadcast_to(0, expected[ours].shape)).shape for ours, form in parts
        ]
      except ValueError:  # The config.json asks for an array that is too large for numpy.
        problems.append(f"shape: {theirs} is {value.shape}, expected more than there can be")
        continue
      ends = np.cumsum([shape[0] for shape in shapes])
      shape = (int(ends[-1]), *shapes[0][1:])
      if value.shape != shape:
        problems.append(f"shape: {theirs} is {value.shape}, expected {shape}")
        continue
      if not jnp.issubdtype(value.dtype, jnp.floating):  # For example, quantised to integers.
        problems.append(f"dtype: {theirs} is {value.dtype}, expected floating-point numbers")
        continue
      for (ours, form), part in zip(parts, np.split(value, ends[:-1]), strict=True):
        params[ours] = jnp.asarray(form.to_ours(part), jnp.float32)
    if problems:
      raise InputError("the checkpoint does not fit its config.json:\n  " + "\n  ".join(problems))
    return params

  def _by_one_name(self, tensors: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Returns the tensors under their names in `places`, and the aliases that are inconsistent."""
    single, problems = dict(tensors), []
    for alias, name in self.aliases.items():
      if alias not in single:
        continue
      value = single.pop(alias)
      if not np.array_equal(single.setdefault(name, value), value, equal_nan=True):
        problems.append(
            f"different: {alias} and {name}, which are one tensor"
            + (" where tie_word_embeddings is true" if alias == HEAD else "")
        )
    return single, problems

  def to_theirs(self, params: Params) -> dict[str, np.ndarray]:
    """Converts parameters to their tensors, float32 and contiguous.

    Raises:
      ValueError: the names of `params` are not those in `places`.
    """
    if params.keys() != self.places.keys():
      different = ", ".join(sorted(params.keys() ^ self.places.keys()))
      raise ValueError(f"parameters that only the model or its layout has: {different}")
    return {
        theirs: np.ascontiguousarray(np.concatenate(
            [form.to_theirs(np.asarray(params[ours], np.float32)) for ours, form in parts]
        ))
        for theirs, parts in self._tensors().items()
    }

  def _tensors(self) -> dict[str, list[tuple[str, Form]]]:
    """Returns for each of their tensors the parameters it consists of, with their forms."""
    tensors: dict[str, list[tuple[str, Form]]] = {}
    for ours, (theirs, form) in self.places.items():
      tensors.setdefault(theirs, []).append((ours, form))
    return tensors


def llama_like(config: ModelConfig, layers: Mapping[str, Place], unused: Iterable[str]) -> Layout:
  """Makes a layout whose tensors outside the layers have the names of Hugging Face's LLaMA.

  Args:
    config: the model. If its head is tied, a checkpoint may or may not hold the head.
    layers: the places of the layers' parameters.
    unused: see `Layout`.
  """
  places: dict[str, Place] = {
      "embedding": ("model.embed_tokens.weight", PLAIN),
      "norm.scale": ("model.norm.weight", PLAIN),
      **layers,
  }
  return with_head(Layout(config, places, frozenset(unused)))


def with_head(layout: Layout) -> Layout:
  """Adds the head to a layout: as a parameter or, if it is tied, as an alias of the embedding."""
  if layout.config.tie_embeddings:
    embedding, _ = layout.places["embedding"]
    return dataclasses.replace(layout, aliases={**layout.aliases, HEAD: embedding})
  return dataclasses.replace(layout, places={**layout.places, "head": (HEAD, TRANSPOSED)})


class Kind(Protocol):
  """A kind of layout, which is implemented by a module of this package."""

  @property
  def NAME(self) -> str:
    """Its name in messages."""

  def layout(self, config: Config) -> Layout | None:
    """Returns the layout of a `config.json`; None means that it is of another kind.

    Raises:
      InputError: a key has a value that this project's models do not support.
    """

  def config_json(self, config: ModelConfig) -> dict[str, Any] | None:
    """Returns the `config.json` of a model; None means that this kind cannot represent it."""

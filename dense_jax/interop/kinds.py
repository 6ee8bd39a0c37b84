"""The kinds of layout that can be read and written, and the choice between them."""

from typing import Any

from dense_jax.config import ModelConfig
from dense_jax.errors import InputError
from dense_jax.interop import dense_retnet, llama, mamba, mamba2, native
from dense_jax.interop.layout import Config, Kind, Layout

# DenseRetNet comes first, because its model_type is llama; the last layout can hold every model.
KINDS: tuple[Kind, ...] = (dense_retnet, mamba, mamba2, llama, native)


def recognise(config: Config) -> Layout:
  """Returns the layout of the checkpoint that has this `config.json`.

  Raises:
    InputError: it is of no known kind, or has a value that this project's models do not support.
  """
  for kind in KINDS:
    layout = kind.layout(config)
    if layout is not None:
      return layout
  raise InputError(
      f"config.json: model_type {config.get('model_type')!r} is not of a known "
      f"layout: expected {', '.join(kind.NAME for kind in KINDS)}"
  )


def choose(config: ModelConfig) -> tuple[str, dict[str, Any], Layout]:
  """Returns name, `config.json` and layout of the first kind that can represent the model."""
  for kind in KINDS:
    values = kind.config_json(config)
    if values is not None:
      return kind.NAME, values, recognise(values)
  raise AssertionError("the last kind has every model")

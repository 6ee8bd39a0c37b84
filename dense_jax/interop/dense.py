"""The checkpoint layout of this project, which can hold every model.

`config.json`:

    model_type        "dense_jax"
    format_version    1
    model             the keys of `dense_jax.config.ModelConfig`, `dense` and `mixer` nested

`model.safetensors`: float32 parameters by their own names (`dense_jax.models.params`) and in
their own shapes, every layer apart: `embedding`, `stack.head.<layer>.<parameter>`,
`norm.scale` and, if it is not tied, `head`. So that the names do not depend on how layers
were compiled, `block_layers` equals `layers`.
"""

import dataclasses
from typing import Any

from dense_jax.config import ModelConfig, build, defaults
from dense_jax.interop.keys import Keys
from dense_jax.interop.layout import PLAIN, Config, Layout
from dense_jax.models.params import abstract_model, get_params
from dense_jax.models.registry import family

NAME = "dense_jax"
FORMAT_VERSION = 1


def layout(config: Config) -> Layout | None:
  """See `Kind`."""
  if config.get("model_type") != NAME:
    return None
  keys = Keys(config, {})
  keys.only("format_version", FORMAT_VERSION)
  values = keys.get("model")
  if not isinstance(values, dict):
    raise keys.invalid("model", "the keys of a model's configuration")
  model_keys = Keys(values, defaults(ModelConfig))
  model_keys.layers("layers")
  if not isinstance(model_keys.get("family"), str):
    raise model_keys.invalid("family", "a name")
  mixer_class = family(model_keys.get("family")).config
  path = "config.json: model"
  model = build(ModelConfig, values, path, {f"{path}.mixer": mixer_class})
  model = dataclasses.replace(model, block_layers=model.layers)
  return Layout(model, {name: (name, PLAIN) for name in get_params(abstract_model(model))})


def config_json(config: ModelConfig) -> dict[str, Any] | None:
  """See `Kind`; never None."""
  model = dataclasses.replace(config, block_layers=config.layers)
  return {"model_type": NAME, "format_version": FORMAT_VERSION, "model": defaults(model)}

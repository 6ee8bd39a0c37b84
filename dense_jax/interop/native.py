"""The checkpoint layout of this project, which can hold every model.

`config.json`:

    model_type        "dense_jax"
    format_version    1
    model             the keys of `dense_jax.config.ModelConfig`, `dense` and `mixer` nested

`model.safetensors`: float32 parameters in their own shapes and by their own names, by layer
(`dense_jax.models.params`): `embedding`, `layers.<layer>.<parameter>`, `norm.scale` and, if it
is not tied, `head`. How layers were scanned is no part of a model: `block_layers` is `layers`.
"""

from typing import Any

from dense_jax.config import ModelConfig, build, defaults
from dense_jax.interop.keys import Keys
from dense_jax.interop.layout import PLAIN, Config, Layout
from dense_jax.models.params import abstract_model, by_layer, get_params, unrolled_config
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
  names = by_layer(model, get_params(abstract_model(model)))
  return Layout(model, {name: (name, PLAIN) for name in names})


def config_json(config: ModelConfig) -> dict[str, Any] | None:
  """See `Kind`; never None."""
  model = defaults(unrolled_config(config))
  return {"model_type": NAME, "format_version": FORMAT_VERSION, "model": model}

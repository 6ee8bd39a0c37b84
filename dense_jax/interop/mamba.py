"""The layout of Hugging Face `MambaForCausalLM` checkpoints."""

import math
from typing import Any

from dense_jax.config import ModelConfig, build
from dense_jax.interop.keys import Keys
from dense_jax.interop.layout import (
    DEPTHWISE,
    PLAIN,
    TRANSPOSED,
    Config,
    Layout,
    Place,
    per_layer,
    with_head,
)
from dense_jax.layers.mamba import MambaConfig

NAME = "mamba"

_LAYER: dict[str, Place] = {
    "norm.scale": ("norm.weight", PLAIN),
    "mixer.in_proj.kernel": ("mixer.in_proj.weight", TRANSPOSED),
    "mixer.gate_proj.kernel": ("mixer.in_proj.weight", TRANSPOSED),
    "mixer.conv.kernel": ("mixer.conv1d.weight", DEPTHWISE),
    "mixer.conv.bias": ("mixer.conv1d.bias", PLAIN),
    "mixer.x_proj.kernel": ("mixer.x_proj.weight", TRANSPOSED),
    "mixer.dt_proj.kernel": ("mixer.dt_proj.weight", TRANSPOSED),
    "mixer.dt_bias": ("mixer.dt_proj.bias", PLAIN),
    "mixer.a_log": ("mixer.A_log", TRANSPOSED),
    "mixer.d": ("mixer.D", PLAIN),
    "mixer.out_proj.kernel": ("mixer.out_proj.weight", TRANSPOSED),
}
# Defaults of missing keys, from transformers' MambaConfig.
_DEFAULTS = {
    "vocab_size": 50280, "hidden_size": 768, "num_hidden_layers": 32, "state_size": 16,
    "expand": 2, "conv_kernel": 4, "time_step_rank": "auto", "layer_norm_epsilon": 1e-5,
    "use_bias": False, "use_conv_bias": True, "hidden_act": "silu", "time_step_min": 1e-3,
    "time_step_max": 0.1, "time_step_floor": 1e-4, "tie_word_embeddings": True,
}


def layout(config: Config) -> Layout | None:
  """See `Kind`."""
  if config.get("model_type") != NAME:
    return None
  keys = Keys(config, _DEFAULTS)
  rank = 0 if keys.get("time_step_rank") == "auto" else keys.integer("time_step_rank")
  return selective_layout(
      keys, _LAYER, family="mamba", mixer_class=MambaConfig, mixer={"dt_rank": rank}
  )


def selective_layout(
    keys: Keys, layer: dict[str, Place], *, family: str, mixer_class: type, mixer: dict[str, Any]
) -> Layout:
  """Makes the layout of a Mamba or Mamba-2 checkpoint; their configurations share most keys.

  Args:
    keys: the checkpoint's configuration.
    layer: the places of one layer's parameters.
    family: this project's name of the family.
    mixer_class: the class of the family's own options.
    mixer: the values of options that only this family has.

  Raises:
    InputError: a key has a value that this project's models do not support.
  """
  keys.only("use_bias", False)
  keys.only("use_conv_bias", True)
  keys.only("hidden_act", "silu", "swish")
  width, layers = keys.integer("hidden_size"), keys.layers("num_hidden_layers")
  expand = keys.integer("expand")
  if keys.get("intermediate_size") is not None:
    keys.only("intermediate_size", expand * width)
  model = build(
      ModelConfig,
      {
          "family": family,
          "vocab_size": keys.integer("vocab_size"),
          "width": width,
          "layers": layers,
          "tie_embeddings": keys.flag("tie_word_embeddings"),
          "norm_eps": keys.positive("layer_norm_epsilon"),
          "mixer": mixer | {
              "expand": expand,
              "state_size": keys.integer("state_size"),
              "conv_width": keys.integer("conv_kernel", 2),
              "dt_min": keys.positive("time_step_min"),
              "dt_max": keys.positive("time_step_max"),
              "dt_floor": keys.positive("time_step_floor"),
          },
      },
      "config.model",
      {"config.model.mixer": mixer_class},
  )
  places: dict[str, Place] = {
      "embedding": ("backbone.embeddings.weight", PLAIN),
      "norm.scale": ("backbone.norm_f.weight", PLAIN),
      **per_layer(layer, "backbone.layers.", range(layers)),
  }
  # The embedding's name in checkpoints of mamba_ssm, which transformers accepts too.
  aliases = {"backbone.embedding.weight": "backbone.embeddings.weight"}
  return with_head(Layout(model, places, aliases=aliases))


def config_json(config: ModelConfig) -> dict[str, Any] | None:
  """See `Kind`."""
  if config.family != "mamba" or config.dense.depth:
    return None
  options: MambaConfig = config.mixer
  return selective_config_json(config) | {
      "architectures": ["MambaForCausalLM"],
      "model_type": NAME,
      "time_step_rank": options.dt_rank or math.ceil(config.width / 16),
  }


def selective_config_json(config: ModelConfig) -> dict[str, Any]:
  """Returns the keys of `config.json` that Mamba and Mamba-2 share."""
  options = config.mixer
  return {
      "vocab_size": config.vocab_size,
      "hidden_size": config.width,
      "num_hidden_layers": config.layers,
      "state_size": options.state_size,
      "expand": options.expand,
      "intermediate_size": options.expand * config.width,
      "conv_kernel": options.conv_width,
      "use_bias": False,
      "use_conv_bias": True,
      "hidden_act": "silu",
      "layer_norm_epsilon": config.norm_eps,
      "residual_in_fp32": True,
      "time_step_min": options.dt_min,
      "time_step_max": options.dt_max,
      "time_step_floor": options.dt_floor,
      "tie_word_embeddings": config.tie_embeddings,
  }

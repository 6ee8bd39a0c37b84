"""The layout of Hugging Face `Mamba2ForCausalLM` checkpoints."""

import math
from typing import Any

from dense_jax.config import ModelConfig
from dense_jax.interop.keys import Keys
from dense_jax.interop.layout import DEPTHWISE, PLAIN, TRANSPOSED, Config, Layout, Place
from dense_jax.interop.mamba import selective_config_json, selective_layout
from dense_jax.layers.mamba2 import Mamba2Config

NAME = "mamba2"

_LAYER: dict[str, Place] = {
    "norm.scale": ("norm.weight", PLAIN),
    "mixer.gate_proj.kernel": ("mixer.in_proj.weight", TRANSPOSED),
    "mixer.in_proj.kernel": ("mixer.in_proj.weight", TRANSPOSED),
    "mixer.bcdt_proj.kernel": ("mixer.in_proj.weight", TRANSPOSED),
    "mixer.x_conv.kernel": ("mixer.conv1d.weight", DEPTHWISE),
    "mixer.bc_conv.kernel": ("mixer.conv1d.weight", DEPTHWISE),
    "mixer.x_conv.bias": ("mixer.conv1d.bias", PLAIN),
    "mixer.bc_conv.bias": ("mixer.conv1d.bias", PLAIN),
    "mixer.dt_bias": ("mixer.dt_bias", PLAIN),
    "mixer.a_log": ("mixer.A_log", PLAIN),
    "mixer.d": ("mixer.D", PLAIN),
    "mixer.norm.scale": ("mixer.norm.weight", PLAIN),
    "mixer.out_proj.kernel": ("mixer.out_proj.weight", TRANSPOSED),
}
# Defaults of missing keys, from transformers' Mamba2Config.
_DEFAULTS = {
    "vocab_size": 32768, "hidden_size": 4096, "num_hidden_layers": 64, "state_size": 128,
    "num_heads": 128, "head_dim": 64, "n_groups": 8, "expand": 2, "conv_kernel": 4,
    "layer_norm_epsilon": 1e-5, "use_bias": False, "use_conv_bias": True, "hidden_act": "silu",
    "time_step_min": 1e-3, "time_step_max": 0.1, "time_step_floor": 1e-4,
    "time_step_limit": [0.0, math.inf], "tie_word_embeddings": False,
}


def layout(config: Config) -> Layout | None:
  """See `Kind`."""
  if config.get("model_type") != NAME:
    return None
  keys = Keys(config, _DEFAULTS)
  inner, head_dim = keys.integer("expand") * keys.integer("hidden_size"), keys.integer("head_dim")
  if keys.integer("num_heads") * head_dim != inner:
    raise keys.invalid(
        "num_heads", f"expand * hidden_size / head_dim = {inner} / {head_dim}"
    )
  low, high = _limits(keys)
  mixer = {
      "head_dim": head_dim,
      "groups": keys.integer("n_groups"),
      "dt_limit_min": low,
      "dt_limit_max": 0.0 if math.isinf(high) else high,  # 0 means no limit.
  }
  return selective_layout(
      keys, _LAYER, family="mamba2", mixer_class=Mamba2Config, mixer=mixer
  )


def _limits(keys: Keys) -> tuple[float, float]:
  """Returns time_step_limit; newer transformers write infinity as {"__float__": "Infinity"}."""
  value = keys.get("time_step_limit")
  wrong = keys.invalid(
      "time_step_limit", "[min, max] with 0 <= min <= max and max > 0, which may be Infinity"
  )
  if not isinstance(value, list | tuple) or len(value) != 2:
    raise wrong
  try:
    low, high = (float(v["__float__"] if isinstance(v, dict) else v) for v in value)
  except (KeyError, OverflowError, TypeError, ValueError):
    raise wrong from None
  if not (0 <= low <= high and high > 0 and math.isfinite(low)):
    raise wrong
  return low, high


def config_json(config: ModelConfig) -> dict[str, Any] | None:
  """See `Kind`."""
  if config.family != "mamba2" or config.dense.depth:
    return None
  options: Mamba2Config = config.mixer
  values = selective_config_json(config) | {
      "architectures": ["Mamba2ForCausalLM"],
      "model_type": NAME,
      "num_heads": options.expand * config.width // options.head_dim,
      "head_dim": options.head_dim,
      "n_groups": options.groups,
  }
  if options.dt_limit_min or options.dt_limit_max:
    values["time_step_limit"] = [options.dt_limit_min, options.dt_limit_max or math.inf]
  return values

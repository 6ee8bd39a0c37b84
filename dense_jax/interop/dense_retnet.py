"""The layout of the authors' DenseRetNet checkpoints (arXiv 2403.00818, released code).

Its `config.json` says model_type `llama`; the keys `query_key_dim` and `v_factor` tell it from
a LLaMA.
"""

import dataclasses
from typing import Any

from dense_jax.config import DenseConfig, ModelConfig, build
from dense_jax.errors import InputError
from dense_jax.interop.keys import Keys
from dense_jax.interop.layout import PLAIN, TRANSPOSED, Config, Layout, Place, llama_like, per_layer
from dense_jax.layers.dense.gate import bottleneck
from dense_jax.layers.gau_retnet import GauRetNetConfig

NAME = "DenseRetNet (query_key_dim, v_factor and dense_block_layers)"

_LAYER: dict[str, Place] = {
    "norm.scale": ("input_layernorm.weight", PLAIN),
    "mixer.q_proj.kernel": ("self_attn.q_proj.weight", TRANSPOSED),
    "mixer.k_proj.kernel": ("self_attn.k_proj.weight", TRANSPOSED),
    "mixer.v_proj.kernel": ("self_attn.to_hidden.0.weight", TRANSPOSED),
    "mixer.gate_proj.kernel": ("self_attn.to_hidden.0.weight", TRANSPOSED),
    "mixer.out_proj.kernel": ("self_attn.to_out.0.weight", TRANSPOSED),
    "mixer.head_norm.scale": ("self_attn.group_norm.weight", PLAIN),
}
_DENSE: dict[str, Place] = {
    "mixer.dense.gates.k.0.down.kernel": ("self_attn.k_select.fc1.weight", TRANSPOSED),
    "mixer.dense.gates.k.0.up.kernel": ("self_attn.k_select.fc2.weight", TRANSPOSED),
    "mixer.dense.gates.v.0.down.kernel": ("self_attn.v_select.fc1.weight", TRANSPOSED),
    "mixer.dense.gates.v.0.up.kernel": ("self_attn.v_select.fc2.weight", TRANSPOSED),
    "mixer.dense.norms.k.scale": ("self_attn.k_norm.weight", PLAIN),
    "mixer.dense.norms.v.scale": ("self_attn.v_norm.weight", PLAIN),
}


def layout(config: Config) -> Layout | None:
  """See `Kind`."""
  if "query_key_dim" not in config or "v_factor" not in config:
    return None
  needed = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
            "rms_norm_eps", "dense_block_layers")
  missing = [key for key in needed if key not in config]
  if missing:
    raise InputError(f"config.json lacks {', '.join(missing)}")
  keys = Keys(config, {"tie_word_embeddings": False})
  if keys.integer("dense_block_layers", 0) < 1:
    raise keys.invalid(
        "dense_block_layers",
        "an integer >= 1 (the released code normalises keys and values even without dense "
        "layers, which no base model here does)",
    )
  layers = keys.layers("num_hidden_layers")
  # There is no layer below the first to read, so a greater depth computes the same function.
  depth = min(keys.integer("dense_block_layers"), layers - 1)
  model = build(
      ModelConfig,
      {
          "family": "gau_retnet",
          "vocab_size": keys.integer("vocab_size"),
          "width": keys.integer("hidden_size"),
          "layers": layers,
          "tie_embeddings": keys.flag("tie_word_embeddings"),
          "norm_eps": keys.positive("rms_norm_eps"),
          "dense": {"depth": depth, "inject": "inputs", "input_norm": True},
          "mixer": {
              "heads": keys.integer("num_attention_heads"),
              "key_dim": keys.integer("query_key_dim"),
              "expand": keys.integer("v_factor"),
          },
      },
      "config.model",
      {"config.model.mixer": GauRetNetConfig},
  )
  places = per_layer(_LAYER, "model.layers.", range(layers))
  places |= per_layer(_DENSE, "model.layers.", range(1, layers))
  unused = {"model.retnet_rel_pos.angle", "model.retnet_rel_pos.decay"}
  # The first layer reads no other layer, but the released code makes gates and norms for it too.
  unused |= {f"model.layers.0.{theirs}" for theirs, _ in _DENSE.values()}
  return llama_like(model, places, unused)


def _is_released(config: ModelConfig) -> bool:
  """Returns whether the released code can compute the model.

  Its gates have D / 32 channels inside, and D / 2 for keys and 2 D for values whatever the widths
  of these are. Options that only affect the initialisation may differ from those it has.
  """
  options = config.mixer
  if not isinstance(options, GauRetNetConfig):
    return False
  released = DenseConfig(depth=config.dense.depth, inject="inputs")
  alike = dataclasses.replace(
      config.dense, gate_init=released.gate_init, gate_reduction=released.gate_reduction,
      transition_rank=released.transition_rank,
  )
  return (
      config.dense.depth > 0 and alike == released
      and bottleneck(config) == config.width // 32
      and 2 * (options.key_dim or config.width // 2) == config.width and options.expand == 2
  )


def config_json(config: ModelConfig) -> dict[str, Any] | None:
  """See `Kind`."""
  if not _is_released(config):
    return None
  options: GauRetNetConfig = config.mixer
  return {
      "architectures": ["LlamaForCausalLM"],
      # With the authors' file beside the checkpoint and trust_remote_code, transformers uses the
      # class in that file; its own LLaMA computes another function.
      "auto_map": {"AutoModelForCausalLM": "modeling_dense_gau_retnet.LlamaForCausalLM"},
      "model_type": "llama",
      "vocab_size": config.vocab_size,
      "hidden_size": config.width,
      "num_hidden_layers": config.layers,
      "num_attention_heads": options.heads,
      "query_key_dim": options.key_dim or config.width // 2,
      "v_factor": options.expand,
      "dense_block_layers": config.dense.depth,
      "rms_norm_eps": config.norm_eps,
      "tie_word_embeddings": config.tie_embeddings,
      "hidden_act": "silu",
      "dropout": 0.0,
      "deepnorm": False,
      "retnorm": False,
      "use_cache": False,
  }

"""The layout of the authors' DenseRetNet checkpoints (arXiv 2403.00818, released code)."""

from collections.abc import Mapping
from typing import Any

from dense_jax.config import ModelConfig, build
from dense_jax.interop.layout import Layout
from dense_jax.layers.gau_retnet import GauRetNetConfig
from dense_jax.types import InputError

_LAYER = {
    "norm.scale": "input_layernorm.weight",
    "mixer.q_proj.kernel": "self_attn.q_proj.weight",
    "mixer.k_proj.kernel": "self_attn.k_proj.weight",
    "mixer.hidden_proj.kernel": "self_attn.to_hidden.0.weight",
    "mixer.out_proj.kernel": "self_attn.to_out.0.weight",
    "mixer.head_norm.scale": "self_attn.group_norm.weight",
}
_DENSE = {
    "mixer.dense.gates.k.0.down.kernel": "self_attn.k_select.fc1.weight",
    "mixer.dense.gates.k.0.up.kernel": "self_attn.k_select.fc2.weight",
    "mixer.dense.gates.v.0.down.kernel": "self_attn.v_select.fc1.weight",
    "mixer.dense.gates.v.0.up.kernel": "self_attn.v_select.fc2.weight",
    "mixer.dense.norms.k.scale": "self_attn.k_norm.weight",
    "mixer.dense.norms.v.scale": "self_attn.v_norm.weight",
}


def layout(config: Mapping[str, Any]) -> Layout | None:
  """The layout of a DenseRetNet `config.json`; None if it is of another kind.

  Raises:
    InputError: a key is missing or has a value that cannot be.
  """
  if "query_key_dim" not in config or "v_factor" not in config:
    return None
  needed = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
            "rms_norm_eps", "dense_block_layers")
  missing = [key for key in needed if key not in config]
  if missing:
    raise InputError(f"config.json lacks {', '.join(missing)}")
  if config["dense_block_layers"] < 1:
    raise InputError(
        f"config.json: dense_block_layers = {config['dense_block_layers']} is not valid: "
        "expected an integer >= 1 (the released code normalises keys and values even "
        "without dense layers, which no base model here does)"
    )
  layers = config["num_hidden_layers"]
  tied = bool(config.get("tie_word_embeddings", False))
  # A layer below the first cannot be read: a greater depth is the same function.
  depth = min(config["dense_block_layers"], layers - 1)
  mixer = {
      "heads": config["num_attention_heads"],
      "key_dim": config["query_key_dim"],
      "expand": config["v_factor"],
  }
  model = build(
      ModelConfig,
      {
          "family": "gau_retnet",
          "vocab_size": config["vocab_size"],
          "width": config["hidden_size"],
          "layers": layers,
          "tie_embeddings": tied,
          "norm_eps": config["rms_norm_eps"],
          "block_layers": layers,
          "dense": {"depth": depth, "inject": "inputs", "input_norm": True},
          "mixer": mixer,
      },
      "config.model",
      {"config.model.mixer": GauRetNetConfig},
  )
  names = {"embedding": "model.embed_tokens.weight", "norm.scale": "model.norm.weight"}
  unused = {"model.retnet_rel_pos.angle", "model.retnet_rel_pos.decay"}
  if tied:
    unused.add("lm_head.weight")
  else:
    names["head"] = "lm_head.weight"
  for layer in range(layers):
    for ours, theirs in (_LAYER | _DENSE).items():
      tensor = f"model.layers.{layer}.{theirs}"
      if layer == 0 and ours in _DENSE:
        unused.add(tensor)  # Made by the released code, and never used.
      else:
        names[f"stack.head.{layer}.{ours}"] = tensor
  return Layout(model, names, frozenset(unused))

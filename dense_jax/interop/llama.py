"""The layout of Hugging Face `LlamaForCausalLM` checkpoints.

In transformers every token attends to all tokens before it; here, only to the last `context`
ones, which is set to `max_position_embeddings`. Up to that length both compute the same.
"""

from typing import Any

from dense_jax.config import ModelConfig, build
from dense_jax.interop.keys import Keys
from dense_jax.interop.layout import PLAIN, TRANSPOSED, Config, Layout, Place, llama_like, per_layer
from dense_jax.layers.attention import AttentionConfig, ffn_width, head_dim

NAME = "llama"

_LAYER: dict[str, Place] = {
    "norm.scale": ("input_layernorm.weight", PLAIN),
    "mixer.q_proj.kernel": ("self_attn.q_proj.weight", TRANSPOSED),
    "mixer.k_proj.kernel": ("self_attn.k_proj.weight", TRANSPOSED),
    "mixer.v_proj.kernel": ("self_attn.v_proj.weight", TRANSPOSED),
    "mixer.out_proj.kernel": ("self_attn.o_proj.weight", TRANSPOSED),
    "ffn_norm.scale": ("post_attention_layernorm.weight", PLAIN),
    "feed_forward.gate_proj.kernel": ("mlp.gate_proj.weight", TRANSPOSED),
    "feed_forward.up_proj.kernel": ("mlp.up_proj.weight", TRANSPOSED),
    "feed_forward.down_proj.kernel": ("mlp.down_proj.weight", TRANSPOSED),
}
# Defaults of missing keys, from transformers' LlamaConfig.
_DEFAULTS = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "hidden_act": "silu",
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    "attention_bias": False, "mlp_bias": False, "rope_theta": 10000.0,
}


def layout(config: Config) -> Layout | None:
  """See `Kind`."""
  if config.get("model_type") != NAME:
    return None
  keys = Keys(config, _DEFAULTS)
  keys.only("attention_bias", False)
  keys.only("mlp_bias", False)
  keys.only("hidden_act", "silu", "swish")
  layers = keys.layers("num_hidden_layers")
  heads, optional = keys.integer("num_attention_heads"), ("num_key_value_heads", "head_dim")
  kv_heads, head = (0 if keys.get(key) is None else keys.integer(key) for key in optional)
  model = build(
      ModelConfig,
      {
          "family": "transformer",
          "vocab_size": keys.integer("vocab_size"),
          "width": keys.integer("hidden_size"),
          "layers": layers,
          "tie_embeddings": keys.flag("tie_word_embeddings"),
          "norm_eps": keys.positive("rms_norm_eps"),
          "mixer": {
              "heads": heads,
              "kv_heads": kv_heads,
              "head_dim": head,
              "rope_theta": _rope_theta(keys),
              "context": keys.integer("max_position_embeddings"),
              "ffn_width": keys.integer("intermediate_size"),
          },
      },
      "config.model",
      {"config.model.mixer": AttentionConfig},
  )
  # Old checkpoints hold the frequencies of the rotation, which follow from rope_theta.
  unused = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(layers)}
  return llama_like(model, per_layer(_LAYER, "model.layers.", range(layers)), unused)


def _rope_theta(keys: Keys) -> float:
  """Returns the base of the rotation, from `rope_parameters` (newer transformers) or older keys.

  Raises:
    InputError: the frequencies are scaled, or only a part of each head is rotated.
  """
  theta = keys.positive("rope_theta")
  for key in ("rope_scaling", "rope_parameters"):
    rope = keys.get(key)
    if rope is None:
      continue
    kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else None
    if kind != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
      raise keys.invalid(key, "rope_type default, or none (positions that are not scaled)")
    if "rope_theta" in rope:
      theta = Keys(rope, {}).positive("rope_theta")
  return theta


def config_json(config: ModelConfig) -> dict[str, Any] | None:
  """See `Kind`; transformers requires that the number of heads divides the width."""
  if config.family != "transformer" or config.dense.depth:
    return None
  options: AttentionConfig = config.mixer
  if config.width % options.heads:
    return None
  return {
      "architectures": ["LlamaForCausalLM"],
      "model_type": NAME,
      "vocab_size": config.vocab_size,
      "hidden_size": config.width,
      "intermediate_size": ffn_width(config),
      "num_hidden_layers": config.layers,
      "num_attention_heads": options.heads,
      "num_key_value_heads": options.kv_heads or options.heads,
      "head_dim": head_dim(config),
      "hidden_act": "silu",
      "max_position_embeddings": options.context,
      "rms_norm_eps": config.norm_eps,
      "tie_word_embeddings": config.tie_embeddings,
      "attention_bias": False,
      "mlp_bias": False,
      # Both forms, because older versions of transformers know only the first.
      "rope_theta": options.rope_theta,
      "rope_parameters": {"rope_type": "default", "rope_theta": options.rope_theta},
  }

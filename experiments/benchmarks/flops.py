"""What a train step computes, by formula: model FLOPs and their share of the peak (MFU).

    forward   = 2 * matmul parameters + sum over layers (4 + 2 S) * state       a token
    training  = 3 * forward

Matmul parameters are the kernels of linear layers and the head; an embedding's lookup is
none, but a tied embedding is the head. Of a layer's state of H P N (or E N) numbers, the
recurrence adds v k^T (one multiplication and addition each), and reads it with its own
query and once more for each of its S sources with state injection. Element-wise work, decays
and convolutions, recomputation and the extra work of chunks do not count.
"""

import math

import jax

from dense_jax.config import ModelConfig
from dense_jax.costs.chips import CHIPS
from dense_jax.models.language_model import LanguageModel
from dense_jax.models.params import abstract_model, get_params


def matmul_parameters(config: ModelConfig) -> int:
  """Numbers that a token is multiplied with: linear layers' kernels and the head."""
  params = get_params(abstract_model(config))
  kernels = sum(
      leaf.size for name, leaf in params.items()
      if name.endswith(".kernel") and not name.endswith("conv.kernel")
  )
  return kernels + config.width * config.vocab_size


def state_size(model: LanguageModel) -> int:
  """Numbers in all layers' recurrent states "h" of one row."""
  layers = jax.eval_shape(lambda: model.init_state(1)).layers
  return sum(
      math.prod(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(layers)
      if path[-1] == jax.tree_util.DictKey("h")
  )


def train_flops(config: ModelConfig) -> int:
  """Model FLOPs of training on one token."""
  state = state_size(abstract_model(config))
  sources = 0
  if config.dense.depth and config.dense.inject == "state":
    sources = sum(map(config.dense.sources, range(config.layers)))
  recurrence = 4 * state + 2 * sources * state // config.layers
  return 3 * (2 * matmul_parameters(config) + recurrence)


def utilization(config: ModelConfig, tokens_per_second: float, device_kind: str) -> float | None:
  """MFU in bf16 on one device, such as "NVIDIA H200"; None where its peak is not known."""
  for name, chip in CHIPS.items():
    if name in device_kind.lower().split():
      return train_flops(config) * tokens_per_second / chip.flops
  return None

"""Model FLOPs of training, by formula.

    forward   = 2 * matmul parameters + sum over layers (4 + 2 S) * state + attention
    training  = 3 * forward                                                       per token

Matmul parameters are the kernels of linear layers and the head. An embedding's lookup does not
count, but a tied embedding counts as the head. For a layer whose state has H P N (or E N) numbers,
the recurrence adds v k^T to the state (a multiplication and an addition per number) and reads the
state with its own query (the same again); with state injection, it also reads the state of each of
its S sources. A layer of attention with H heads of N channels multiplies a query with the keys of
its window, and as many values with the result: 4 H N for each token of the window, which grows
along a row until it has `context` tokens. Rows are taken as one document each. Element-wise
operations, decays, convolutions, recomputation and the extra work of chunks do not count.
"""

import math

import jax

from dense_jax.config import ModelConfig
from dense_jax.layers.attention import AttentionConfig, head_dim
from dense_jax.models.language_model import LanguageModel
from dense_jax.models.params import abstract_model, get_params


def matmul_parameters(config: ModelConfig) -> int:
  """Returns the number of parameters in the kernels of linear layers and in the head."""
  params = get_params(abstract_model(config))
  kernels = sum(
      leaf.size for name, leaf in params.items()
      if name.endswith(".kernel") and not name.endswith("conv.kernel")
  )
  return kernels + config.width * config.vocab_size


def state_size(model: LanguageModel) -> int:
  """Returns the number of elements of all layers' recurrent states h, for one row."""
  layers = jax.eval_shape(lambda: model.init_state(1)).layers
  return sum(
      math.prod(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(layers)
      if isinstance(path[-1], jax.tree_util.GetAttrKey) and path[-1].name.startswith("h_")
  )


def attention_flops(config: ModelConfig, seq_len: int) -> int:
  """Returns the forward FLOPs of all layers' attention on one token, the mean of a row's."""
  options = config.mixer
  if not isinstance(options, AttentionConfig):
    return 0
  full = min(seq_len, options.context)
  windows = full * (full + 1) // 2 + (seq_len - full) * full  # Of all tokens of the row.
  return config.layers * 4 * options.heads * head_dim(config) * windows // seq_len


def train_flops(config: ModelConfig, seq_len: int) -> int:
  """Returns the model FLOPs of training on one token of rows of `seq_len` tokens."""
  state = state_size(abstract_model(config))
  sources = 0
  if config.dense.depth and config.dense.inject == "state":
    sources = sum(map(config.dense.sources, range(config.layers)))
  recurrence = 4 * state + 2 * sources * state // config.layers
  return 3 * (2 * matmul_parameters(config) + recurrence + attention_flops(config, seq_len))

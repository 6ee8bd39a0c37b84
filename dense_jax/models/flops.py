"""Model FLOPs of training, by formula.

    forward   = 2 * matmul parameters + sum over layers (4 + 2 S) * state       per token
    training  = 3 * forward

Matmul parameters are the kernels of linear layers and the head. An embedding's lookup does not
count, but a tied embedding counts as the head. For a layer whose state has H P N (or E N)
numbers, the recurrence adds v k^T to the state (a multiplication and an addition per number) and
reads the state with its own query (the same again); with state injection, it also reads the state
of each of its S sources. Element-wise operations, decays, convolutions, recomputation and the
extra work of chunks do not count.
"""

import math

import jax

from dense_jax.config import ModelConfig
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


def train_flops(config: ModelConfig) -> int:
  """Returns the model FLOPs of training on one token."""
  state = state_size(abstract_model(config))
  sources = 0
  if config.dense.depth and config.dense.inject == "state":
    sources = sum(map(config.dense.sources, range(config.layers)))
  recurrence = 4 * state + 2 * sources * state // config.layers
  return 3 * (2 * matmul_parameters(config) + recurrence)

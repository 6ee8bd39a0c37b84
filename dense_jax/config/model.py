"""The language model: `config.model`."""

import dataclasses
import math
from typing import Any

from dense_jax.config.checked import Config
from dense_jax.config.dense import DenseConfig
from dense_jax.config.fields import choice, flag, group, integer, invalid, number, text


@dataclasses.dataclass(frozen=True)
class ModelConfig(Config, key="config.model"):
  """One language model."""

  family: str = text(
      "mamba", "a key of dense_jax.models.registry.FAMILIES",
      help="what moves information along time in each layer; docs/families.md describes each")
  vocab_size: int = integer(0, 0, help="V: rows of the embedding; 0 means the tokenizer's pieces")
  width: int = integer(256, 1, help="D: channels of the residual stream")
  layers: int = integer(4, 1, 2**16, help="L: layers")
  tie_embeddings: bool = flag(True, help="whether the head is the embedding's transpose")
  norm_eps: float = number(1e-5, 0, open_low=True, help="epsilon of every RMSNorm")
  dtype: str = choice(
      "float32", "float32", "bfloat16",
      help="dtype of activations and matmuls; parameters, decays, norms' statistics, the loss and "
      "arithmetic on states are always float32")
  state_dtype: str = choice(
      "float32", "float32", "bfloat16",
      help="dtype in which recurrences' states are kept from one decoded token, or one part of a "
      "text, to the next; training keeps none, and the transformer has none; docs/generation.md "
      "says what bfloat16 costs")
  block_layers: int = integer(
      0, 0, help="layers of a super-block, the body of the scan over layers; 0 means the farthest "
      "distance that a layer reads, at least 1, rounded up to a multiple of dense.stride; with the "
      "number of layers, each is compiled apart")
  remat: str = choice(
      "none", "none", "minimal", "reads", "full",
      help="how much the backward pass computes again to save memory, from nothing to nearly "
      "everything; docs/dense.md says what each keeps")
  implementation: str = choice(
      "auto", "auto", "associative", "blockwise", "chunked", "conv", "cudnn", "pallas", "recurrent",
      "softmax", "triton",
      help="how the recurrence is computed; auto means the fastest for the family and the "
      "device, docs/families.md lists what each family has")
  chunk: int = integer(
      0, 0, help="C: tokens of a chunk, in the implementations that work in chunks "
      "(docs/families.md); 0 means each one's own")
  dense: DenseConfig = group(DenseConfig, help="dense hidden connections; docs/dense.md")
  mixer: Any = group(None, help="the family's own options")

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.dense.depth >= self.layers:
      raise invalid(
          "config.model.dense.depth", self.dense.depth,
          f"an integer from 0 to layers - 1 = {self.layers - 1}",
      )
    if self.dense.reach >= self.layers:
      raise invalid(
          "config.model.dense.depth", self.dense.depth,
          f"with reads=spread an integer from 0 to {1 + int(math.log2(self.layers - 1))}: the "
          f"farthest layer is 2 ** (depth - 1) below, of {self.layers} in all",
      )
    if self.dense.depth and self.dense.start >= self.layers:
      raise invalid(
          "config.model.dense.start", self.dense.start,
          f"an integer from 1 to layers - 1 = {self.layers - 1}",
      )
    if self.block_layers in (0, self.layers) or not self.dense.depth:
      return
    if self.dense.inject == "state" and self.dense.source == "fused":
      raise invalid(
          "config.model.block_layers", self.block_layers,
          f"0 or layers = {self.layers} with inject=state and source=fused: each layer reads "
          "another number of states",
      )
    if self.block_layers < self.dense.reach or self.block_layers % self.dense.stride:
      raise invalid(
          "config.model.block_layers", self.block_layers,
          f"0, layers, or a multiple of dense.stride = {self.dense.stride} that is >= "
          f"{self.dense.reach}, as a layer reads the one so far below",
      )

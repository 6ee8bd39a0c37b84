"""Model FLOPs by formula, beside a count by hand."""

from dense_jax.models.flops import matmul_parameters, train_flops
from tests.builders import model_config


def test_flops_by_hand():
  """The model is mamba with D 16, E 32, N 3, R 2, 3 layers, V 11, and gates of rank D / 4."""
  layer = 16 * 64 + 32 * (2 + 3 + 3) + 2 * 32 + 32 * 16
  base = model_config("mamba", layers=3)
  assert matmul_parameters(base) == 3 * layer + 16 * 11
  recurrence = 3 * 4 * 32 * 3
  assert train_flops(base, 24) == 3 * (2 * (3 * layer + 16 * 11) + recurrence)

  dense = model_config("mamba", depth=2, layers=3)
  gates = 2 * (16 * 4 + 4 * 32)
  reads = 2 * (1 + 2) * 32 * 3  # The second layer has one source, the third two.
  assert train_flops(dense, 24) == train_flops(base, 24) + 3 * (2 * gates + reads)


def test_attention_by_hand():
  """Three heads of 4 channels, which need not make up D; a token sees five tokens at most."""
  model = model_config("transformer", layers=2, heads=3, kv_heads=3, head_dim=4, context=5)
  matmuls = 3 * 2 * matmul_parameters(model)
  seen = 1 + 2 + 3 + 4 + 5 + 5 + 5 + 5
  assert train_flops(model, 8) == matmuls + 3 * (2 * 4 * 12 * seen // 8)
  assert train_flops(model, 1) == matmuls + 3 * 2 * 4 * 12

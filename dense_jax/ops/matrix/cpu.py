"""Matrix states on XLA's CPU backend: chunks that fit its caches, and a workaround for decoding."""

import dataclasses

import jax
import jax.numpy as jnp

from dense_jax.ops.chunks import chunk_ends, chunk_length
from dense_jax.ops.matrix.log_decay import LogDecay, summed_log_decay, weight
from dense_jax.ops.matrix.reference import matrix_step
from dense_jax.ops.matrix.sequence import MatrixSequence
from dense_jax.ops.token_scan import join_chunks, split_chunks
from dense_jax.types import Array

# Tokens per chunk. One layer's recurrence, forward and backward, 2048 tokens, one core: gau_retnet
# (2 heads, N 128, P 512) 43 ms at 64 and 45 at 128, mamba2 (16 heads, N 128, P 64) 100 and 143.
DEFAULT_CHUNK = 64


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CpuChunkedMatrix(MatrixSequence):
  """Runs matmuls over one chunk after the other, and computes each chunk again backward.

  `ChunkedMatrix` makes the scores and decays of all chunks at once. On a CPU these go through main
  memory, and XLA transposes values and states, the largest arrays, for its matmuls. Here only what
  one chunk needs exists at a time, and states are kept as [N, P], which is how keys and queries
  multiply them. For the layers above, `ChunkedMatrix` takes 108 and 168 ms.
  """

  def _scan(self, q_BTJN: Array) -> tuple[Array, Array]:
    time = q_BTJN.shape[1]
    chunk = chunk_length(self.chunk, DEFAULT_CHUNK, time)
    sums: LogDecay = summed_log_decay(self.log_decay_BTH, chunk)
    sums_GBCH = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), sums)
    tokens = split_chunks((q_BTJN, self.k_BTJN, self.scaled_BTHP(), self.resets_BT), chunk)
    first_BHPN, groups = self.before_first(), q_BTJN.shape[2]
    batch, heads, channels, size = first_BHPN.shape
    first = first_BHPN.reshape(batch, groups, -1, size)  # [B, J, R P, N], R heads of a group.
    final, y = jax.lax.scan(
        jax.checkpoint(_one_chunk, prevent_cse=False), jnp.swapaxes(first, 2, 3),
        (sums_GBCH, chunk_ends(time, chunk), tokens),
    )
    y_BTHP = join_chunks(y, time).reshape(batch, time, heads, channels)
    return y_BTHP, jnp.swapaxes(final, 2, 3).reshape(first_BHPN.shape)


def _one_chunk(
    h_BJNE: Array, inputs: tuple[LogDecay, Array, tuple[Array, Array, Array, Array | None]]
) -> tuple[Array, Array]:
  """Runs one chunk; E stands for the channels of a group's R heads.

  Args:
    h_BJNE: float32 state before the chunk.
    inputs: the summed log decays [B, C, H]; `chunk_ends` of the chunk; q and k, [C, B, J, N], v,
      [C, B, H, P], and the resets, [C, B], or None.

  Returns:
    The state after the chunk, and y_CBHP; float32.
  """
  sums_BCH, is_end_C, (q_CBJN, k_CBJN, v_CBHP, resets_CB) = inputs
  chunk, batch, groups, _ = q_CBJN.shape
  heads, channels = v_CBHP.shape[2:]
  shared, dtype = heads // groups, v_CBHP.dtype

  def matmul(x: Array, y: Array) -> Array:
    return jnp.matmul(x, y, preferred_element_type=jnp.float32)

  def by_group(x_CBHP: Array) -> Array:
    """Reshapes [C, B, H, P] to [B, J, C, R P]."""
    return x_CBHP.reshape(chunk, batch, groups, -1).transpose(1, 2, 0, 3)

  earlier = jnp.tril(jnp.ones((chunk, chunk), bool), -1)[None, None]
  carried_BC1 = same_BC1 = None
  if resets_CB is not None:
    count_BC = jnp.cumsum(resets_CB.T, axis=1, dtype=jnp.int32)
    earlier = earlier & (count_BC[:, :, None] == count_BC[:, None])[:, None]
    carried_BC1 = (count_BC == 0)[..., None]
    same_BC1 = (count_BC == count_BC[:, -1:])[..., None]

  q_BJCN, k_BJCN = by_group(q_CBJN), by_group(k_CBJN)
  sums_BHC = jax.tree.map(lambda x: jnp.swapaxes(x, 1, 2), sums_BCH)
  # A token's weight for itself is the constant 1; see `chunk_states`.
  log_decay_BHCC = sums_BHC[:, :, :, None].since(sums_BHC[:, :, None])
  decay_BHCC = weight(earlier, log_decay_BHCC) + jnp.eye(chunk)[None, None]
  scores_BJ1CC = matmul(q_BJCN, jnp.swapaxes(k_BJCN, 2, 3))[:, :, None]
  weights = scores_BJ1CC * decay_BHCC.reshape(-1, groups, shared, chunk, chunk)
  weights_BHCC = weights.reshape(batch, heads, chunk, chunk).astype(dtype)
  y_CBHP = matmul(weights_BHCC, v_CBHP.transpose(1, 2, 0, 3)).transpose(2, 0, 1, 3)
  before = matmul(q_BJCN, h_BJNE.astype(q_BJCN.dtype)).transpose(2, 0, 1, 3)
  from_start_BCH = weight(carried_BC1, sums_BCH.total())
  y_CBHP = y_CBHP + before.reshape(y_CBHP.shape) * jnp.swapaxes(from_start_BCH, 0, 1)[..., None]

  last_B1H = sums_BCH[:, -1:]
  to_end_BCH = jnp.where(is_end_C[None, :, None], 0.0, last_B1H.since(sums_BCH))
  to_end_CBH = jnp.swapaxes(weight(same_BC1, to_end_BCH), 0, 1)
  added = matmul(
      jnp.swapaxes(k_BJCN, 2, 3), by_group((v_CBHP * to_end_CBH[..., None]).astype(dtype))
  )
  keeps = weight(None if carried_BC1 is None else carried_BC1[:, -1], last_B1H.total()[:, 0])
  keeps = jnp.repeat(keeps.reshape(-1, groups, 1, shared), channels, axis=3)
  return keeps * h_BJNE + added, y_CBHP


def cpu_matrix_step(h_BHPN: Array, log_decay_BH: Array, k_BJN: Array, v_BHP: Array) -> Array:
  """Computes `matrix_step`, with keys and short values computed before their outer product.

  XLA's CPU backend fuses the computation of a key into its outer product with the values, and
  so repeats it for every channel. Decoding is up to twice as fast without that fusion. Values
  longer than keys are left alone: for them it would cost more than it saves.
  """
  short = v_BHP.shape[-1] <= k_BJN.shape[-1]
  return matrix_step(
      h_BHPN, log_decay_BH, _computed_once(k_BJN), _computed_once(v_BHP) if short else v_BHP
  )


def _computed_once(x: Array) -> Array:
  """Returns x, exactly, as the result of a product with the identity, which XLA does not fuse.

  An `optimization_barrier` does not prevent the fusion.
  """
  return jnp.dot(x, jnp.eye(x.shape[-1], dtype=x.dtype), precision=jax.lax.Precision.HIGHEST)

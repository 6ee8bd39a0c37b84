"""One mixer, forward and backward: its default form against one scan over the whole length.

    mamba        one associative scan, a chunk as long as the row
    s4d          one associative scan over the complex diagonal states of all tokens
    s4           one associative scan over dense N x N transitions, because float32 has no usable
                 basis in which its matrix is diagonal; N is only 8, to limit the time of both
    the others   chunks joined by an associative scan; the default joins them by `lax.scan`

Rivals that the package does not have are written here. Each rival must agree with the default's
outputs before anything is timed.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dense_jax.batch import Segments, Token
from dense_jax.config import ModelConfig
from dense_jax.layers.dense.connection import Shared
from dense_jax.layers.mixer import Mixer, MixerOutput
from dense_jax.layers.s4 import S4, S4D, S4State
from dense_jax.models.registry import FAMILIES
from dense_jax.ops.epilogue import Epilogue
from dense_jax.types import Array, PyTree
from experiments.benchmarks import common
from experiments.benchmarks.common import SSM_FAMILIES, Size, Table

WIDTH, TIME_STEPS = 128, 8192
QUICK_FAMILIES = ("mamba", "mamba2", "s4d", "s4")
BARS = {"mamba": 2.0, "s4d": 2.0}
S4_STATE_SIZE = 8
# Greatest difference of float32 outputs relative to the largest one: T terms are summed in
# different orders.
AGREEMENT = 1e-3


def _compose_diagonal(left: tuple[Array, Array], right: tuple[Array, Array]) -> tuple[Array, Array]:
  return right[0] * left[0], right[0] * left[1] + right[1]


def _compose_dense(left: tuple[Array, Array], right: tuple[Array, Array]) -> tuple[Array, Array]:
  product = jnp.einsum("...nk,...km->...nm", right[0], left[0])
  return product, jnp.einsum("...nk,...k->...n", right[0], left[1]) + right[1]


def scanned_s4d(a_ENN: Array, b_EN: Array, c_EN: Array, x_BTE: Array) -> Array:
  """Computes y_BTE by one associative scan over the M = N / 2 conjugate pairs of all tokens.

  Args:
    a_ENN: the transition of a diagonal system, [[re, -im], [im, re]] of its eigenvalues.
    b_EN: the input map, real parts first.
    c_EN: the query, likewise.
    x_BTE: the inputs.
  """
  pairs = b_EN.shape[1] // 2
  a_EM = jax.lax.complex(
      jnp.diagonal(a_ENN[:, :pairs, :pairs], axis1=1, axis2=2),
      jnp.diagonal(a_ENN[:, pairs:, :pairs], axis1=1, axis2=2),
  )
  b_EM = jax.lax.complex(b_EN[:, :pairs], b_EN[:, pairs:])
  u_BTEM = b_EM[None, None] * x_BTE[..., None]
  a_BTEM = jnp.broadcast_to(a_EM[None, None], u_BTEM.shape)
  _, h_BTEM = jax.lax.associative_scan(_compose_diagonal, (a_BTEM, u_BTEM), axis=1)
  c_re_EM, c_im_EM = c_EN[:, :pairs], c_EN[:, pairs:]
  return jnp.sum(c_re_EM[None, None] * h_BTEM.real + c_im_EM[None, None] * h_BTEM.imag, axis=-1)


def scanned_s4(a_ENN: Array, b_EN: Array, c_EN: Array, x_BTE: Array) -> Array:
  """Computes y_BTE by one associative scan over dense transitions; arguments as `scanned_s4d`."""
  u_BTEN = b_EN[None, None] * x_BTE[..., None]
  a_BTENN = jnp.broadcast_to(a_ENN[None, None], (*x_BTE.shape[:2], *a_ENN.shape))
  _, h_BTEN = jax.lax.associative_scan(_compose_dense, (a_BTENN, u_BTEN), axis=1)
  return jnp.einsum("bten,en->bte", h_BTEN, c_EN)


class ScannedS4D(S4D):
  """S4D's mixer, its read by one associative scan."""

  def __call__(
      self, x_D: Array, tokens: Segments | Token, state: S4State | None, shallow: Sequence[Shared]
  ) -> MixerOutput:
    """See `Mixer`; supports only rows that begin without a state, and returns no final state."""
    scanned = scanned_s4 if isinstance(self, S4) else scanned_s4d
    y_BTE = scanned(*self.system().dense(), self.c[...], x_D)
    y_BTE = Epilogue(self.d[...], x_D)(y_BTE).y
    return MixerOutput(self._output(y_BTE, x_D.dtype), None, None)


class ScannedS4(ScannedS4D, S4):
  """S4's mixer, its read by one associative scan."""


MixerFactory = Callable[..., Mixer]


def rival(
    family: str, config: ModelConfig, length: int
) -> tuple[MixerFactory, ModelConfig, str]:
  """Returns the rival's mixer, its configuration, and a description for the table.

  Args:
    family: a key of FAMILIES.
    config: the configuration of the default form.
    length: T.
  """
  mixer = FAMILIES[family].mixer
  if family == "s4d":
    return ScannedS4D, config, "associative scan of all tokens"
  if family == "s4":
    return ScannedS4, config, "associative scan of all tokens, dense"
  config = dataclasses.replace(config, implementation="associative")
  if FAMILIES[family].form == "diagonal":
    whole = dataclasses.replace(config, chunk=length)
    return mixer, whole, "associative scan of all tokens"
  return mixer, config, "chunks joined by associative scan"


def passes(
    mixer: MixerFactory, config: ModelConfig, x_BTD: Array
) -> tuple[Array, Callable[[], object]]:
  """Returns a mixer's output for rows of one document, and a call of its forward and backward."""
  graph, params = nnx.split(mixer(config, sources=0, rngs=nnx.Rngs(0)))
  segments = Segments(jnp.arange(x_BTD.shape[1], dtype=jnp.int32)[None])

  def output(params: PyTree, x_BTD: Array) -> Array:
    return nnx.merge(graph, params)(x_BTD, segments, None, ()).y

  def loss(params: PyTree, x_BTD: Array) -> Array:
    return jnp.sum(output(params, x_BTD) ** 2)

  gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
  return jax.jit(output)(params, x_BTD), lambda: gradient(params, x_BTD)


def modes(quick: bool) -> Iterator[Table]:
  """Compares every family's mixer with its rival."""
  width, length = (16, 64) if quick else (WIDTH, TIME_STEPS)
  size = Size(width, 1, 2, 1, length)
  x_BTD = jax.random.normal(jax.random.key(0), (1, length, width))
  rows = [["family", "default, ms", "rival, ms", "rival over default", "its range", "bar", "rival"]]
  results = {}
  for family in common.progress(QUICK_FAMILIES if quick else SSM_FAMILIES, "modes"):
    mixer = {"state_size": S4_STATE_SIZE} if family == "s4" else {}
    if quick and family == "mamba2":
      mixer = {"head_dim": 8}
    config = common.config(family, size, mixer=mixer).model
    other, other_config, name = rival(family, config, length)
    y_BTD, ours = passes(FAMILIES[family].mixer, config, x_BTD)
    rival_BTD, theirs = passes(other, other_config, x_BTD)
    error = float(jnp.max(jnp.abs(y_BTD - rival_BTD)) / jnp.max(jnp.abs(y_BTD)))
    if not np.isfinite(error) or error > AGREEMENT:
      raise AssertionError(f"{family}: the rival's output differs by {error:.2g} of the largest")
    times = common.compare(common.timed(ours), common.timed(theirs), 1 if quick else 5)
    results[family] = common.figures(
        default=times.first, rival=times.second, ratio=times.ratio, low=times.low,
        high=times.high, bar=BARS.get(family), difference=error,
    )
    rows.append([family, f"{1e3 * times.first:.1f}", f"{1e3 * times.second:.1f}",
                 common.ratio(times.ratio), times.range(), common.bar(BARS.get(family)), name])
  yield Table(f"One mixer, forward and backward, D {width}, T {length}", rows, results)

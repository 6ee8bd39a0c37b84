"""S4 (arXiv 2111.00396) and S4D (arXiv 2206.11893): time-invariant state space layers.

    y = C h + D u,    out = a * sigmoid(b)  with  a, b = split(W_out gelu(y))

Each of the E = D channels has a system of its own, with an A that is diagonal (S4D) or diagonal
plus rank one (S4). The real part of A and dt are parametrised by logarithms, so that the
continuous system stays stable. dt starts log-uniform in [dt_min, dt_max] and C Gaussian; A, P and
B come from HiPPO (`dense_jax.ops.lti.hippo`). A feed-forward layer follows, as in the published
language model.

The input map B is constant: no input of the recurrence is a function of the token, so dense
injection "inputs" has nothing to fuse. The query C is constant too, so every read, of the layer's
own states or of a shallower layer's, is one convolution.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dense_jax.batch import Segments, Token
from dense_jax.config import Config, ModelConfig, choice, integer, invalid, number
from dense_jax.layers.dense import make_connection
from dense_jax.layers.dense.connection import NO_INPUTS, Shared
from dense_jax.layers.feed_forward import FeedForward
from dense_jax.layers.linear import Linear, fan_in_uniform, normal, parameter
from dense_jax.layers.metrics import record_memory
from dense_jax.layers.mixer import MixerOutput
from dense_jax.ops import resolver
from dense_jax.ops.epilogue import Epilogue
from dense_jax.ops.lti import hippo
from dense_jax.ops.lti.system import DiagonalSystem, DplrSystem, System
from dense_jax.types import Array


@dataclasses.dataclass(frozen=True)
class S4Config(Config, key="config.model.mixer"):
  """S4's own options."""

  state_size: int = integer(
      64, 2, help="N, even: real numbers of each channel's state, N / 2 conjugate pairs")
  dt_min: float = number(
      1e-3, 0, open_low=True, help="lower end of dt at initialisation, which is log-uniform")
  dt_max: float = number(1e-1, 0, open_low=True, help="upper end of dt at initialisation")
  ffn_width: int = integer(0, 0, help="width of the feed-forward layer; 0 means 4 D")

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.state_size % 2:
      raise invalid("config.model.mixer.state_size", self.state_size, "an even integer >= 2")
    if self.dt_min > self.dt_max:
      raise invalid(
          "config.model.mixer.dt_min", self.dt_min, f"a number <= dt_max = {self.dt_max:g}"
      )


@dataclasses.dataclass(frozen=True)
class S4DConfig(S4Config):
  """S4D's own options, beside those of `S4Config`."""

  init: str = choice(
      "lin", "lin", "inv", "legs",
      help="how A starts (arXiv 2206.11893): S4D-Lin, S4D-Inv, or LegS without its low-rank part")
  discretization: str = choice(
      "zoh", "zoh", "bilinear",
      help="from continuous time to steps: zero-order hold, exp(dt A), or the bilinear map")


def feed_forward(config: ModelConfig, rngs: nnx.Rngs) -> FeedForward:
  """Makes the layer that follows the mixer."""
  return FeedForward(config, config.mixer.ffn_width or 4 * config.width, kind="gelu", rngs=rngs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class S4State:
  """The systems' states, h_BNE, float32: real parts first, then imaginary parts."""

  h_BNE: Array


class S4D(nnx.Module):
  """S4D's mixer; see `Mixer`."""

  form: ClassVar[str] = "lti"
  log_a: nnx.Param
  a_imag: nnx.Param
  b: nnx.Param

  def __init__(self, config: ModelConfig, *, sources: int, rngs: nnx.Rngs) -> None:
    options: S4Config = config.mixer
    self.width, self.state_size = config.width, options.state_size
    self.recurrence = resolver.lti_form(config.implementation, config.chunk)

    def constant(values: np.ndarray) -> nnx.Param:
      """Makes a parameter [values, E] that starts the same in each channel."""
      return parameter(
          rngs, (len(values), self.width), (None, "inner"),
          lambda _, shape: jnp.broadcast_to(jnp.asarray(values, jnp.float32)[:, None], shape),
      )

    def log_dt(key: Array, shape: tuple[int, ...]) -> Array:
      low, high = math.log(options.dt_min), math.log(options.dt_max)
      return jax.random.uniform(key, shape, jnp.float32, low, high)

    for name, values in self.initial_system(options).items():
      setattr(self, name, constant(values))
    self.log_dt = parameter(rngs, (self.width,), ("inner",), log_dt)
    # Corresponds to 2 Re(C h) for a complex C of unit variance.
    self.c = parameter(
        rngs, (self.width, self.state_size), ("inner", None), normal(math.sqrt(2))
    )
    self.d = parameter(
        rngs, (self.width,), ("inner",), lambda key, shape: jax.random.normal(key, shape)
    )
    self.out_proj = Linear(
        self.width, 2 * config.width, axes=("inner", "embed"), init=fan_in_uniform(), rngs=rngs
    )
    self.dense = make_connection(
        config, form=self.form, sources=sources, rngs=rngs,
        query=(self.state_size,), channels=self.width,
        inputs={}, fixed_query=True,
    )

  def initial_system(self, options: S4Config) -> dict[str, np.ndarray]:
    """Returns names and initial values of the system's parameters, without the channel axis."""
    assert isinstance(options, S4DConfig)
    size = options.state_size
    make = {"lin": hippo.s4d_lin, "inv": hippo.s4d_inv, "legs": hippo.s4d_legs}
    eigenvalues = make[options.init](size)
    self.discretization = options.discretization
    return {
        "log_a": np.log(-eigenvalues.real), "a_imag": eigenvalues.imag,
        "b": np.repeat([1.0, 0.0], size // 2),
    }

  def system(self) -> System:
    """Returns the systems of all channels."""
    return DiagonalSystem(
        -jnp.exp(self.log_a[...]), self.a_imag[...], jnp.exp(self.log_dt[...]), self.b[...],
        self.discretization,
    )

  def _output(self, y_E: Array, dtype: jnp.dtype) -> Array:
    """Applies activation, in float32, and gated output projection, in `dtype`."""
    y_E = jax.nn.gelu(y_E, approximate=False).astype(dtype)
    a_D, b_D = jnp.split(self.out_proj(y_E), 2, axis=-1)
    return a_D * jax.nn.sigmoid(b_D)

  def __call__(
      self, x_D: Array, tokens: Segments | Token, state: S4State | None,
      shallow: Sequence[Shared],
  ) -> MixerOutput:
    """See `Mixer`."""
    # From the diagonal part in continuous time: |exp(dt a)| = exp(dt Re a).
    record_memory(lambda: -jnp.exp(self.log_dt[...][None] + self.log_a[...]))
    before_BNE = None if state is None else state.h_BNE
    states = self.recurrence(self.system(), x_D, tokens, before_BNE)
    epilogue = Epilogue(self.d[...], x_D)
    output, h_BNE, states = self.dense.run(x_D, self.c[...], states, shallow, epilogue)
    return MixerOutput(
        self._output(output.y, x_D.dtype), S4State(h_BNE), self.dense.share(NO_INPUTS, states)
    )

  def init_state(self, batch: int) -> S4State:
    """See `Mixer`."""
    return S4State(jnp.zeros((batch, self.state_size, self.width), jnp.float32))


class S4(S4D):
  """S4's mixer: the full HiPPO-LegS matrix, discretised bilinearly; see `Mixer`."""

  p: nnx.Param

  def initial_system(self, options: S4Config) -> dict[str, np.ndarray]:
    """See `S4D`."""
    eigenvalues, p, b, _ = hippo.nplr_legs(options.state_size)
    return {
        "log_a": np.log(-eigenvalues.real), "a_imag": eigenvalues.imag,
        "p": np.concatenate([p.real, p.imag]), "b": np.concatenate([b.real, b.imag]),
    }

  def system(self) -> System:
    """See `S4D`."""
    return DplrSystem(
        -jnp.exp(self.log_a[...]), self.a_imag[...], self.p[...], jnp.exp(self.log_dt[...]),
        self.b[...],
    )

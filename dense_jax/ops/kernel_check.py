"""Compares the kernels of a form of state with its specification on the device that will run them.

A compiler may translate a kernel wrongly for a card that it was not tested on, and a training run
then goes wrong without a word. So a kernel that nobody asked for by name is used only after it has
computed a small case like the specification: a layer's own read, reads of two sources with one
low-rank gate (as one recurrence, where all layers have the same decays), the epilogue, final state
and all gradients, in two rows of two documents each, with a state before the first.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from dense_jax.batch import Segments
from dense_jax.ops import resolver
from dense_jax.ops.epilogue import Epilogue
from dense_jax.ops.injection import Inject
from dense_jax.ops.matmul import matmul
from dense_jax.ops.recurrence import LowRankGate, Read, Recurrence, Sizes
from dense_jax.ops.short_conv import Convolve, short_conv
from dense_jax.types import Array, PyTree

# Root mean squares of errors over those of the right values. Kernels round scores, and states for
# products, to the model's dtype; a wrong kernel is wrong by orders of magnitude more.
LIMITS: Mapping[str, float] = {"bfloat16": 0.02, "float32": 1e-3}
# Several chunks of any kernel. The second document begins inside a chunk, or where one begins.
_TIME, _BORDERS = 300, (141, 192)
_RANK = 32  # Of gates.

Inputs = dict[str, PyTree]
Make = Callable[[str, Inputs, Segments], Recurrence]


def kernel_errors(
    form: str, implementation: str, sizes: Sizes, dtype: str, *, injection: bool = False
) -> dict[str, float]:
  """Runs an implementation and the specification on a small case.

  Args:
    form: "diagonal" or "matrix".
    implementation: the name of the implementation, in `resolver.IMPLEMENTATIONS[form]`.
    sizes: the layer's.
    dtype: the model's, a key of `LIMITS`.
    injection: whether the layers inject inputs, which may have kernels too.

  Returns:
    For y, the moments (matrix states), the final state and the gradient of each input: the root
    mean square of the error over that of the right values. The same for the short convolution and
    its gradients, if a kernel comes with the implementation, and for input injection.
  """
  make, inputs = make_case(form, sizes, jnp.dtype(dtype), (len(_BORDERS), _TIME))
  place = np.arange(_TIME)
  second = place >= np.asarray(_BORDERS)[:, None]
  positions = np.where(second, place - np.asarray(_BORDERS)[:, None], place + 5)
  segments = Segments(jnp.asarray(positions), jnp.asarray(1 + second))

  def outputs(implementation: str, inputs: Inputs) -> PyTree:
    own, *sources = (
        make(implementation, inputs[name], segments) for name in ("own", "source", "other")
    )
    epilogue = Epilogue(
        inputs["skip"], inputs["own"]["x"], inputs["z"], dtype=jnp.dtype(dtype),
        moments=form == "matrix",
    )
    reads = [
        Read(source, inputs["query"], inputs["gate"], dtype=jnp.dtype(dtype)) for source in sources
    ]
    output, final = own.finish(inputs["query"], reads, epilogue)
    found = {"y": output.y.astype(jnp.float32), "final": final}
    return found if output.moments is None else found | {"moments": output.moments}

  def everything(implementation: str, inputs: Inputs) -> PyTree:
    def objective(inputs: Inputs) -> tuple[Array, PyTree]:
      found = outputs(implementation, inputs)
      weights = {name: _normal(90 + len(name), value.shape) for name, value in found.items()}
      total = sum(
          jnp.sum(weights[name] * value) / value.size**0.5 for name, value in found.items()
      )
      return total, found

    gradients, found = jax.grad(objective, has_aux=True)(inputs)
    return found | {"gradient": gradients}

  run = jax.jit(everything, static_argnums=0)
  exact = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), inputs)
  right = run("recurrent", exact)
  found = run(implementation, inputs)
  if resolver.PLATFORMS.get(implementation) == "gpu":
    right |= _convolution(resolver.convolution(form, "recurrent", split=False), segments, exact)
    kernel = resolver.convolution(form, implementation, split=False)
    found |= _convolution(kernel, segments, inputs)
  if injection:
    right |= _injection(resolver.injection(form, "recurrent"), exact)
    found |= _injection(resolver.injection(form, implementation), inputs)
  return {
      jax.tree_util.keystr(path, simple=True, separator="."): _error(value, wanted)
      for (path, value), wanted in zip(
          jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(right), strict=True
      )
  }


def make_case(
    form: str, sizes: Sizes, dtype: jnp.dtype, lead: tuple[int, int]
) -> tuple[Make, Inputs]:
  """Makes random inputs of a layer and two sources, whose reads have one gate.

  Args:
    form: "diagonal" or "matrix".
    sizes: the layer's.
    dtype: that of queries, keys, values and gates; the others are float32.
    lead: B and T.

  Returns:
    What makes a recurrence of `inputs["own"]`, `inputs["source"]` or `inputs["other"]`, given the
    name of an implementation, and the inputs.
  """
  return {"diagonal": _diagonal, "matrix": _matrix}[form](sizes, dtype, lead)


def _gate(lead: tuple[int, int], width: int, dtype: jnp.dtype) -> LowRankGate:
  hidden, up = _normal(22, (*lead, _RANK), dtype), _normal(24, (_RANK, width))
  return LowRankGate(hidden, up * _RANK**-0.5, matmul)


def _convolution(function: Convolve, segments: Segments, inputs: Inputs) -> PyTree:
  """Returns the convolution of the own values, and its gradients."""
  x_BTE = inputs["own"]["x"]
  taps = {"kernel": _normal(30, (4, x_BTE.shape[2])), "bias": _normal(31, x_BTE.shape[2:])}
  weights, tail_BWE = _normal(32, x_BTE.shape), x_BTE[:, 5:8]

  def objective(x_BTE: Array, taps: Inputs, tail_BWE: Array) -> tuple[Array, Array]:
    y_BTE, _ = short_conv(x_BTE, taps["kernel"], taps["bias"], segments, tail_BWE, function)
    y_BTE = y_BTE.astype(jnp.float32)
    return jnp.sum(weights * y_BTE), y_BTE

  gradients, y_BTE = jax.jit(jax.grad(objective, argnums=(0, 1, 2), has_aux=True))(
      x_BTE, taps, tail_BWE
  )
  return {"convolution": {"y": y_BTE, "gradient": gradients}}


@dataclasses.dataclass(frozen=True)
class CheckedNorm:
  """A root-mean-square norm as the formula has it.

  Attributes:
    scale: [E], float32.
    epsilon: what is added to the mean square.
  """

  scale: Array
  epsilon: float = 1e-5

  def __call__(self, x: Array) -> Array:
    """Maps [..., E] to the same shape, in x's dtype."""
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.epsilon)
    return (x32 * inverse * jnp.broadcast_to(self.scale, x.shape)).astype(x.dtype)


def _injection(function: Inject, inputs: Inputs) -> PyTree:
  """Returns the own values, fused with those of the source, and the gradients."""
  x_BTE = inputs["own"]["x"]
  width = x_BTE.shape[-1]
  arguments = {
      "own": x_BTE, "source": inputs["source"]["x"],
      "hidden": _normal(50, (*x_BTE.shape[:2], 32), x_BTE.dtype) / 4,
      "up": _normal(51, (32, width)) / 4, "scale": 1 + _normal(52, (width,)) / 4,
  }

  def objective(arguments: Inputs) -> tuple[Array, Array]:
    gate = LowRankGate(arguments["hidden"], arguments["up"], matmul)
    injected = function(
        arguments["own"], [arguments["source"]], [gate], CheckedNorm(arguments["scale"])
    )
    weights = (_normal(53 + index, x_BTE.shape) for index in range(len(injected)))
    total = sum(
        jnp.sum(weight * x.astype(jnp.float32))
        for weight, x in zip(weights, injected, strict=True)
    )
    return jnp.asarray(total), injected.fused_E.astype(jnp.float32)

  gradients, y_BTE = jax.jit(jax.grad(objective, has_aux=True))(arguments)
  return {"injection": {"y": y_BTE, "gradient": gradients}}


def _error(found: Array, right: Array) -> float:
  """Returns the relative error; not finite if `found` is not."""
  found64, right64 = np.asarray(found, np.float64), np.asarray(right, np.float64)
  scale = max(float(np.mean(right64**2)), 1e-30)
  return math.sqrt(float(np.mean((found64 - right64) ** 2)) / scale)


def _normal(seed: int, shape: tuple[int, ...], dtype: jnp.dtype | None = None) -> Array:
  """Makes Gaussian numbers."""
  values = np.random.default_rng(seed).standard_normal(shape, np.float32)
  return jnp.asarray(values, dtype)


def _matrix(sizes: Sizes, dtype: jnp.dtype, lead: tuple[int, int]) -> tuple[Make, Inputs]:
  heads, groups, size = sizes.heads, sizes.groups, sizes.state_size
  width = heads * sizes.channels

  equal_BTH = jnp.broadcast_to(jnp.linspace(-0.01, -0.2, heads), (1, lead[1], heads))

  def states(seed: int) -> Inputs:
    inputs = {
        "k": _normal(seed, (*lead, groups, size), dtype),
        "x": _normal(seed + 1, (*lead, width), dtype),
        "initial": _normal(seed + 3, (lead[0], heads, sizes.channels, size)),
    }
    if sizes.equal_decays:  # Those of retention: constants, and values have no scale.
      return inputs
    scale = 0.05 + 0.05 * _normal(seed + 2, (*lead, heads)) ** 2
    log_decay = -scale * jnp.linspace(0.2, 4, heads)[None, None]
    return inputs | {"scale": scale, "log_decay": log_decay}

  def make(implementation: str, inputs: Inputs, segments: Segments) -> Recurrence:
    x_BTHP = inputs["x"].reshape(*inputs["x"].shape[:2], heads, -1)
    form = resolver.matrix_form(implementation, 0, equal_decays=sizes.equal_decays)
    return form(
        inputs["k"], x_BTHP, inputs.get("scale"), inputs.get("log_decay", equal_BTH), segments,
        inputs["initial"],
    )

  return make, {
      "own": states(0), "source": states(10), "other": states(40), "skip": _normal(20, (heads,)),
      "query": _normal(21, (*lead, groups, size), dtype) * size**-0.5,
      "gate": _gate(lead, width, dtype), "z": _normal(23, (*lead, width), dtype),
  }


def _diagonal(sizes: Sizes, dtype: jnp.dtype, lead: tuple[int, int]) -> tuple[Make, Inputs]:
  width, size = sizes.channels, sizes.state_size

  def states(seed: int) -> Inputs:
    return {
        "dt": 0.05 + 0.05 * _normal(seed, (*lead, width)) ** 2,
        "a": -jnp.broadcast_to(jnp.arange(1.0, size + 1)[:, None], (size, width)),
        "x": _normal(seed + 1, (*lead, width), dtype), "b": _normal(seed + 2, (*lead, size), dtype),
        "initial": _normal(seed + 3, (lead[0], size, width)),
    }

  def make(implementation: str, inputs: Inputs, segments: Segments) -> Recurrence:
    return resolver.diagonal_form(implementation, 0)(
        inputs["dt"], inputs["a"], inputs["x"], inputs["b"], segments, inputs["initial"]
    )

  return make, {
      "own": states(0), "source": states(10), "other": states(40), "skip": _normal(20, (width,)),
      "query": _normal(21, (*lead, size), dtype),
      "gate": _gate(lead, width, dtype), "z": _normal(23, (*lead, width), dtype),
  }

"""Tests of time-invariant systems: discretisation, kernels and sequence forms.

The systems are compared with scipy's discretisation and float64 powers, the sequence forms with
the float32 specification of `dense_jax.ops.lti.reference`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal

from dense_jax.ops.lti import hippo
from dense_jax.ops.lti.chunked import lti_chunk_read, lti_chunk_states
from dense_jax.ops.lti.convolution import fft_convolution, fft_length
from dense_jax.ops.lti.reference import lti_read, lti_states, lti_step
from dense_jax.ops.lti.system import DiagonalSystem, DplrSystem
from tests.builders import fast_jit, normal, packed
from tests.helpers import assert_trees_close
from tests.ops.sequences import after_last_valid, documents, everything, one_document

B, E, N = 3, 3, 8
ROW = [3, *[7] * 4, 32, 1, 1, 200]
KINDS = ["zoh", "bilinear", "dplr"]
# For the sequence forms the two discretisations differ only in numbers.
SEQUENCE_KINDS = [
    pytest.param("zoh", marks=pytest.mark.slow),
    pytest.param("bilinear", marks=pytest.mark.exhaustive), "dplr",
]
# (length, chunks, with documents); without documents, only the masks differ.
QUICK = [("zoh", 4, (3,), False), ("dplr", 4, (3,), True)]
SLOW = [(1, (3,), True), (33, (32,), True), (257, (3, 32), True), (1, (), False)]
RARE = [(time, (3,), True) for time in (2, 3)] + [(time, (32,), True) for time in (31, 32)]
RARE += [(63, (1,), True), (33, (32,), False), (64, (32,), False), (257, (3,), False)]
CASES = [
    *QUICK,
    pytest.param("bilinear", 63, (3,), True, marks=pytest.mark.slow),
    pytest.param("zoh", 4, (3,), True, marks=pytest.mark.slow),
    pytest.param("dplr", 4, (3,), False, marks=pytest.mark.slow),
    *(pytest.param("dplr", *case, marks=pytest.mark.slow) for case in SLOW),
    *(
        pytest.param(kind, *case, marks=pytest.mark.exhaustive)
        for kind, cases in (("zoh", SLOW + RARE), ("dplr", RARE)) for case in cases
    ),
    pytest.param("bilinear", 63, (32,), False, marks=pytest.mark.exhaustive),
]


def _system(kind, noise=0.3, dt=None, width=E, size=N):
  """Makes a LegS system; `noise` perturbs every parameter of every channel."""
  eigenvalue, p, b, _ = hippo.nplr_legs(size)
  rng = np.random.default_rng(0)

  def spread(x):
    away = np.exp(noise * rng.standard_normal((len(x), width)))
    return jnp.asarray(x[:, None] * away, jnp.float32)

  values = {
      "a_re_ME": spread(eigenvalue.real), "a_im_ME": spread(eigenvalue.imag),
      "dt_E": jnp.asarray(np.geomspace(0.005, 0.05, width) if dt is None else dt, jnp.float32),
      "b_NE": spread(np.concatenate([b.real, b.imag])),
  }
  if kind == "dplr":
    return DplrSystem(p_NE=spread(np.concatenate([p.real, p.imag])), **values)
  return DiagonalSystem(discretization=kind, **values)


def _float64(system):
  """Computes the discrete a_ENN and b_EN by scipy, from the continuous real matrices."""
  fields = {
      field.name: np.asarray(getattr(system, field.name), np.float64)
      for field in dataclasses.fields(system) if field.name != "discretization"
  }
  return _discretize(fields, getattr(system, "discretization", "bilinear"))


def _discretize(fields, method):
  discrete = []
  for e, dt in enumerate(fields["dt_E"]):
    re, im = (np.diag(fields[name][:, e]) for name in ("a_re_ME", "a_im_ME"))
    a = np.block([[re, -im], [im, re]])
    if "p_NE" in fields:
      a = a - 2 * np.outer(fields["p_NE"][:, e], fields["p_NE"][:, e])
    b = fields["b_NE"][:, e : e + 1]
    continuous = (a, b, np.zeros_like(b.T), np.zeros((1, 1)))
    a, b, *_ = scipy.signal.cont2discrete(continuous, dt, method)
    discrete.append((a, b[:, 0]))
  return tuple(np.stack(parts) for parts in zip(*discrete, strict=True))


def _powers(a, x, count):
  """x, a x, a a x, ...: [count, E, N], float64."""
  powers = []
  for _ in range(count):
    powers.append(x)
    x = np.einsum("enk,ek->en", a, x)
  return np.stack(powers)


@pytest.mark.parametrize("dt", [None, 1e-4, 10.0], ids=["dt", "small-dt", "large-dt"])
@pytest.mark.parametrize("noise", [0.0, 0.3], ids=["legs", "perturbed"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_discrete_system_is_scipys(kind, noise, dt):
  system = _system(kind, noise, None if dt is None else np.full(E, dt))
  a, b = fast_jit(lambda system: system.dense())(system)
  expected_a, expected_b = _float64(system)
  assert_trees_close(a, expected_a)
  # The input map is proportional to dt where that is small.
  size = float(np.std(expected_b))
  assert_trees_close(b, expected_b, scale=min(size, 1.0))


@pytest.mark.parametrize("kind", KINDS)
def test_powers_are_those_of_the_dense_matrix(kind):
  system, c, length = _system(kind), normal(0, E, N), 33
  h, x = normal(1, B, N, E), normal(2, B, E)

  @fast_jit
  def run(system, c):
    return (
        system.input_powers(length), system.query_powers(c, length),
        system.advance(length)(h), system.stepper()(h, x),
    )

  a, b = _float64(system)
  transposed = np.swapaxes(a, 1, 2)
  power = np.stack([np.linalg.matrix_power(matrix, length) for matrix in a])
  u = b.T[None] * np.asarray(x)[:, None]
  expected = (
      _powers(a, b, length).swapaxes(1, 2),
      _powers(transposed, np.asarray(c, np.float64), length + 1)[1:].swapaxes(1, 2),
      np.einsum("enk,bke->bne", power, h),
      np.einsum("enk,bke->bne", a, h) + u,
  )
  assert_trees_close(run(system, c), expected)
  assert_trees_close(fast_jit(lti_step)(h, *system.dense(), x), expected[3])


@pytest.mark.parametrize(
    ("size", "length"), [(2, 32), (64, 257), *((N, time) for time in (1, 2, 31, 32, 33, 257))]
)
@pytest.mark.parametrize("noise", [
    pytest.param(0.0, id="legs", marks=pytest.mark.slow), pytest.param(0.3, id="perturbed"),
])
@pytest.mark.parametrize("kind", KINDS)
def test_the_kernel_is_that_of_float64_powers(kind, noise, size, length):
  system, c = _system(kind, noise, size=size), normal(0, E, size)
  a, b = _float64(system)
  expected = np.einsum("ten,en->te", _powers(a, b, length), np.asarray(c, np.float64))
  kernel = fast_jit(lambda system, c: system.kernel(c, length))(system, c)
  assert_trees_close(kernel, expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_kernels_gradient_is_float64s_difference(kind):
  """Along one direction of each parameter; the only test of the branches of discretisation."""
  length, weight = 40, np.asarray(normal(1, 40, E), np.float64)
  # Both sides of the series and of log1p; eigenvalues in every quadrant.
  system = _system(kind, dt=np.array([1e-3, 0.1, 1.0]))
  c = normal(0, E, N)
  fields = {
      field.name: getattr(system, field.name)
      for field in dataclasses.fields(system) if field.name != "discretization"
  }
  method = getattr(system, "discretization", "bilinear")

  def loss(fields):
    kernel = dataclasses.replace(system, **fields).kernel(c, length)
    return jnp.sum(kernel * jnp.asarray(weight, jnp.float32))

  def loss64(fields):
    states = _powers(*_discretize(fields, method), length)
    return np.sum(np.einsum("ten,en->te", states, np.asarray(c, np.float64)) * weight)

  gradients = fast_jit(jax.grad(loss))(fields)
  for name, gradient in gradients.items():
    base = {name: np.asarray(value, np.float64) for name, value in fields.items()}
    direction = np.asarray(normal(2, *gradient.shape), np.float64) * base[name]
    step = 1e-6
    ends = [loss64(base | {name: base[name] + sign * step * direction}) for sign in (1, -1)]
    expected = (ends[0] - ends[1]) / (2 * step)
    assert_trees_close(np.sum(np.asarray(gradient, np.float64) * direction), expected)


def _inputs(kind, time, initial=True):
  # The slowest channels remember about a hundred tokens. With many hundreds, rounding errors
  # add up in the specification's own scan, and only the float64 tests above are reliable.
  system = _system(kind)
  system = dataclasses.replace(system, a_re_ME=4 * system.a_re_ME)
  return {
      "system": system, "c": normal(4, E, N), "x": normal(5, B, time, E),
      "initial": normal(6, B, N, E) * initial,
  }


def _chunked(inputs, segments, chunk):
  before, final = lti_chunk_states(
      inputs["system"], inputs["x"], segments.resets_BT, segments.valid_BT, inputs["initial"],
      chunk=chunk,
  )
  y = lti_chunk_read(
      inputs["system"], inputs["c"], inputs["x"], segments.resets_BT, before, chunk=chunk
  )
  return y, final


def _specification(inputs, segments):
  """Reads the reference's states; the final state is that of the last valid token."""
  a, b = inputs["system"].dense()
  states, _ = lti_states(a, b, inputs["x"], segments.resets_BT, inputs["initial"])
  y = jax.vmap(lti_read, in_axes=(1, None), out_axes=1)(states, inputs["c"])
  return y, after_last_valid(states, inputs["initial"], segments)


def _convolution(inputs, _):
  kernel = inputs["system"].kernel(inputs["c"], inputs["x"].shape[1])
  return fft_convolution(inputs["x"], kernel), jnp.zeros((B, N, E))


_everything = functools.partial(fast_jit, static_argnames="run")(everything)


def _assert_same(actual, expected):
  """Compares each output and gradient relative to its size, if that is above 1."""
  for (path, leaf), expected_leaf in zip(
      jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True
  ):
    size = float(np.sqrt(np.mean(np.square(expected_leaf))))
    assert_trees_close({str(path): leaf}, {str(path): expected_leaf}, scale=max(size, 1.0))


# Defined once, so that tests share compiled functions.
_CHUNKED = {chunk: functools.partial(_chunked, chunk=chunk) for chunk in (1, 3, 32)}


@pytest.mark.parametrize(("kind", "time", "chunks", "packed"), CASES)
def test_every_form_is_the_reference(kind, time, chunks, packed):
  segments = documents(time, ROW) if packed else one_document(time)
  inputs, weights = _inputs(kind, time), (normal(7, B, time, E), normal(8, B, N, E))
  expected = _everything(_specification, inputs, segments, weights)
  for chunk in chunks:
    _assert_same(_everything(_CHUNKED[chunk], inputs, segments, weights), expected)
  if packed:
    return
  # A convolution supports no initial state.
  inputs["initial"], weights = 0 * inputs["initial"], (weights[0], 0 * weights[1])
  (expected_y, _), expected = _everything(_specification, inputs, segments, weights)
  expected.pop("initial")
  (y, _), gradients = _everything(_convolution, inputs, segments, weights)
  gradients.pop("initial")
  _assert_same((y, gradients), (expected_y, expected))


@pytest.mark.parametrize("time", [1, 2, 31, 32, 33, 63, 257])
def test_the_convolution_is_the_direct_sum(time):
  x, k, gradient = normal(0, B, time, E), normal(1, time, E), normal(2, B, time, E)
  y, by = fast_jit(
      lambda x, k: (fft_convolution(x, k), jax.vjp(fft_convolution, x, k)[1](gradient))
  )(x, k)
  x, k, gradient = (np.asarray(array, np.float64) for array in (x, k, gradient))
  expected, by_x, by_k = np.zeros_like(x), np.zeros_like(x), np.zeros_like(k)
  for lag in range(time):
    expected[:, lag:] += k[lag] * x[:, : time - lag]
    by_x[:, : time - lag] += k[lag] * gradient[:, lag:]
    by_k[lag] = np.sum(gradient[:, lag:] * x[:, : time - lag], axis=(0, 1))
  scale = np.sqrt(time)
  assert_trees_close(y, expected, scale=scale)
  assert_trees_close(by, (by_x, by_k), scale=scale * np.sqrt(B))


def test_the_convolutions_length():
  assert [fft_length(n) for n in (1, 2, 7, 11, 509, 511, 513)] == [1, 2, 8, 12, 512, 512, 540]


@pytest.mark.parametrize("kind", SEQUENCE_KINDS)
def test_parts_with_a_carried_state_equal_the_whole(kind):
  time, chunk = 29, 4
  inputs, segments = _inputs(kind, time), documents(time, ROW)
  valid = segments.valid_BT[..., None]

  @fast_jit
  def run(inputs):
    results = []
    for split in (0, 1, 3, 4, 16, 27):  # The first is the whole.
      outputs, state = [], inputs["initial"]
      for begin, end in ((0, split), (split, time)):
        if begin < end:
          part = jax.tree.map(lambda leaf, a=begin, b=end: leaf[:, a:b], segments)
          some = inputs | {"x": inputs["x"][:, begin:end], "initial": state}
          y, state = _chunked(some, part, chunk)
          outputs.append(y)
      results.append((jnp.concatenate(outputs, axis=1) * valid, state))
    return results

  whole, *parts = run(inputs)
  for part in parts:
    assert_trees_close(part, whole)


@pytest.mark.parametrize("form", ["convolution", "chunked"])
@pytest.mark.parametrize("kind", SEQUENCE_KINDS)
def test_extreme_steps_stay_finite(kind, form):
  time = 4096
  system = _system(kind, dt=np.array([1e-4, 10.0]), width=2, size=16)
  # An eigenvalue that the bilinear map takes to zero, and one that never turns.
  system = dataclasses.replace(
      system,
      a_re_ME=system.a_re_ME.at[0].set(jnp.asarray([-0.5, -0.2])).at[1].set(-1e3),
      a_im_ME=system.a_im_ME.at[0].set(0.0),
  )
  inputs = {
      "system": system, "c": normal(0, 2, 16), "x": normal(1, 1, time, 2),
      "initial": jnp.zeros((1, 16, 2)),
  }

  @fast_jit
  def run(inputs):
    def objective(inputs):
      if form == "chunked":
        outputs = _chunked(inputs, one_document(time), 0)
      else:
        outputs = _convolution(inputs, None)[:1]
      return sum(jnp.sum(output) for output in outputs), outputs

    return jax.grad(objective, has_aux=True)(inputs)

  for path, leaf in jax.tree_util.tree_leaves_with_path(run(inputs)):
    assert np.isfinite(leaf).all(), path


@pytest.mark.parametrize("kind", KINDS)
def test_steps_do_not_drift(kind):
  # Over ten time constants of the slowest mode that models start with, driven as fast as it turns.
  time, dt = 20000, 1e-3
  system = _system(kind, noise=0.0, dt=[dt], width=1, size=16)
  slowest = int(jnp.argmin(jnp.abs(system.a_im_ME[:, 0])))
  x = np.cos(np.arange(time) * float(system.dt_E[0] * system.a_im_ME[slowest, 0]))
  x = x.astype(np.float32)

  @fast_jit
  def run(system, x_T):
    step = system.stepper()

    def body(h_BNE, x):
      h_BNE = step(h_BNE, x[None, None])
      return h_BNE, h_BNE[0, :, 0]

    return jax.lax.scan(body, jnp.zeros((1, 16, 1)), x_T)[1]

  (a,), (b,) = _float64(system)
  h, expected = np.zeros(16), np.empty((time, 16))
  for t in range(time):
    expected[t] = h = a @ h + b * x[t]
  size = float(np.sqrt(np.mean(expected**2)))
  assert_trees_close(run(system, jnp.asarray(x)), expected, scale=size)


@pytest.mark.parametrize("kind", SEQUENCE_KINDS)
def test_bfloat16_inputs_keep_float32_states(kind):
  inputs, segments = _inputs(kind, 29), documents(29, ROW)
  low = inputs | {"x": inputs["x"].astype(jnp.bfloat16)}
  rounded = inputs | {"x": low["x"].astype(jnp.float32)}
  run = fast_jit(lambda inputs: (*_chunked(inputs, segments, 3), _convolution(inputs, None)[0]))
  actual = run(low)
  assert [leaf.dtype for leaf in actual] == [jnp.float32] * 3
  assert_trees_close(actual, run(rounded))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["convolution", "chunked", "documents"])
@pytest.mark.parametrize("kind", SEQUENCE_KINDS)
def test_training_never_holds_all_states(kind, form):
  batch, time, width, size = 8, 1024, 16, 64
  inputs = {
      "system": _system(kind, width=width, size=size), "c": normal(0, width, size),
      "x": normal(1, batch, time, width), "initial": jnp.zeros((batch, size, width)),
  }
  segments = one_document(time)
  if form == "documents":
    segments = packed([[100] * 10 + [24]] * batch)

  def loss(inputs):
    if form == "convolution":
      return jnp.sum(jnp.square(_convolution(inputs, None)[0]))
    return jnp.sum(jnp.square(_chunked(inputs, segments, 0)[0]))

  memory = fast_jit(jax.grad(loss)).lower(inputs).compile().memory_analysis()
  # The reference, differentiated, takes four times all states.
  assert memory.temp_size_in_bytes < batch * time * size * width * 4 / 3

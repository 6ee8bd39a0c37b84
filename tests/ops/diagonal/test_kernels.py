"""Tests of the selective kernels for TPUs and GPUs, interpreted, against the specification."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dense_jax.ops.diagonal import gpu, tpu
from dense_jax.ops.diagonal.kernel_inputs import LowRank, Source
from dense_jax.ops.diagonal.reference import diagonal_read, diagonal_states
from dense_jax.ops.epilogue import Epilogue
from tests.builders import COMPILER_OPTIONS, normal
from tests.helpers import assert_trees_close, changed
from tests.ops.sequences import after_last_valid, documents, everything, one_document

B, C = 3, 16
PLATFORMS = {"tpu": tpu.selective_finish, "gpu": gpu.selective_finish}
# Documents that begin inside chunks and at their borders; one has a single token.
ROW = [3, 13, 1, 15, *[20] * 12]

# Unrolled steps are many small operations, and fusing them takes half of the compilation.
jit = functools.partial(
    jax.jit, compiler_options=COMPILER_OPTIONS | {"xla_disable_hlo_passes": "fusion"}
)


def _wide(seed, time, width, rank):
  """Makes E numbers a token: an array, or a product if the rank is not 0."""
  if not rank:
    return normal(seed, B, time, width)
  return LowRank(normal(seed, B, time, rank), normal(seed + 5, rank, width) * rank**-0.5)


def _source(index, time, state_size, width, gate, rank, softplus):
  seed = 20 * index
  dt = _wide(seed, time, width, rank if softplus else 0)
  return Source(
      dt=dt if softplus else jax.nn.softplus(dt - 1),
      bias_E=normal(seed + 7, width) - 1 if softplus else None,
      a_NE=-jnp.exp(normal(seed + 1, state_size, width)),
      x_BTE=normal(seed + 2, B, time, width),
      b_BTN=normal(seed + 3, B, time, state_size),
      c_BTN=normal(seed + 4, B, time, state_size),
      initial_BNE=normal(seed + 6, B, state_size, width),
      gate=gate,
  )


# The gates' ranks, 0 for an array, and each source's gate, whose last ends the list.
GATES = {
    "": ((), (None, None, None)),
    "array": ((0,), (0, None, None)),
    "product": ((3,), (0, None, None)),
    "shared": ((5,), (0, 0, None)),
    "each": ((0, 17), (1, 0, None)),
    "all": ((2,), (0, 0, 0)),
}


def _inputs(time, sources, epilogue="", state_size=4, width=32, gates="array", rank=0):
  """Makes sources; every other one, and the last, has step sizes that are made in the kernel.

  Args:
    epilogue: the parts that it has, of "skip" (of the first source's x), "x" (another one) and "z".
    gates: a key of GATES.
    rank: the rank of the products that make step sizes; 0 for arrays.
  """
  ranks, numbers = GATES[gates]
  numbers = numbers[:sources]
  return {
      "sources": tuple(
          _source(
              index, time, state_size, width, number, rank,
              softplus=(index + sources) % 2 == 1,
          )
          for index, number in enumerate(reversed(numbers))
      ),
      "gates": tuple(
          _wide(70 + 10 * index, time, width, gate_rank)
          for index, gate_rank in enumerate(ranks)
          if index in numbers
      ),
      "epilogue": Epilogue(
          skip=normal(90, width) if "skip" in epilogue else None,
          x=normal(91, B, time, width) if "x" in epilogue else None,
          z=normal(92, B, time, width) if "z" in epilogue else None,
      ),
  }


def _value(wide):
  """Returns E numbers a token as an array, float32."""
  if isinstance(wide, LowRank):
    product = jnp.dot(wide.hidden_BTR, wide.up_RE.astype(wide.dtype), precision="highest")
    wide = product.astype(wide.dtype)
  return wide.astype(jnp.float32)


def _weights(inputs):
  first = inputs["sources"][0]
  return normal(98, *first.x_BTE.shape), normal(99, *first.initial_BNE.shape)


def _masked(source, segments):
  """Returns the source with dt = 0 in the padding, if it has step sizes."""
  if segments.valid_BT is None or source.bias_E is not None:
    return source
  return dataclasses.replace(source, dt=jnp.where(segments.valid_BT[..., None], source.dt, 0))


each_platform = pytest.mark.parametrize("platform", PLATFORMS)


def _kernel(inputs, segments, platform, chunk=C):
  sources = [_masked(source, segments) for source in inputs["sources"]]
  return PLATFORMS[platform](
      sources, inputs["gates"], inputs["epilogue"], segments.resets_BT, segments.valid_BT,
      chunk=chunk, interpret=True,
  )


def _specification(inputs, segments):
  """Sums gated reads of the reference's states; the final state is the first source's."""
  y, finals, epilogue = 0.0, [], inputs["epilogue"]
  for source in inputs["sources"]:
    if source.bias_E is not None:
      dt_BTE = jax.nn.softplus(_value(source.dt) + source.bias_E[None, None])
      source = dataclasses.replace(source, dt=dt_BTE, bias_E=None)
    source = _masked(source, segments)
    states, _ = diagonal_states(
        source.dt, source.a_NE, source.x_BTE, source.b_BTN, segments.resets_BT,
        source.initial_BNE,
    )
    read = jax.vmap(diagonal_read, in_axes=1, out_axes=1)(states, source.c_BTN)
    if source.gate is not None:
      gate = inputs["gates"][source.gate]
      read *= jax.nn.silu(_value(gate)) if isinstance(gate, LowRank) else _value(gate)
    y += read
    finals.append(after_last_valid(states, source.initial_BNE, segments))
  if epilogue.x is None and epilogue.skip is not None:
    epilogue = dataclasses.replace(epilogue, x=inputs["sources"][0].x_BTE)
  return epilogue(y).y, finals[0]


@functools.partial(jit, static_argnames=("run", "platform", "chunk"))
def _run(run, inputs, segments, **options):
  """Returns outputs, final state and gradients of every input."""
  return everything(functools.partial(run, **options), inputs, segments, _weights(inputs))


def _segments(time, packed):
  return documents(time, ROW) if packed else one_document(time)


@each_platform
@pytest.mark.parametrize(
    ("time", "sources", "packed", "epilogue", "state_size", "width", "gates", "rank"),
    [
        (1, 1, False, "", 4, 32, "array", 0),
        (19, 2, True, "skip z", 3, 24, "product", 5),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                (16, 1, True, "skip x z", 4, 32, "all", 1),
                (63, 3, True, "skip z", 16, 32, "shared", 17),
                (37, 3, True, "z", 4, 32, "each", 5),
                (33, 2, False, "z", 3, 512, "product", 5),  # On a TPU two blocks of 256 channels.
            ]
        ),
        *(
            pytest.param(*case, marks=pytest.mark.exhaustive)
            for case in [
                (2, 1, True, "z", 4, 32, "array", 4),
                (15, 1, False, "skip x", 4, 32, "", 3),
                (40, 2, False, "", 4, 32, "product", 16),
                (37, 3, False, "skip", 4, 32, "all", 5),
                (257, 2, True, "skip z", 3, 32, "array", 0),
                (33, 1, True, "skip z", 3, 300, "product", 5),  # Three blocks of 128.
            ]
        ),
    ],
)
def test_outputs_final_state_and_gradients_are_the_references(
    time, sources, packed, epilogue, state_size, width, gates, rank, platform
):
  inputs = _inputs(time, sources, epilogue, state_size, width, gates, rank)
  segments = _segments(time, packed)
  found = _run(_kernel, inputs, segments, platform=platform)
  assert_trees_close(found, _run(_specification, inputs, segments))


@pytest.mark.slow
@each_platform
@pytest.mark.parametrize("chunk", [
    0, *(pytest.param(chunk, marks=pytest.mark.exhaustive) for chunk in (4, 48)),
])
def test_chunk_length_changes_nothing(chunk, platform):
  inputs = _inputs(83, 1, "z", gates="product", rank=4)
  segments = _segments(83, True)
  found = _run(_kernel, inputs, segments, platform=platform, chunk=chunk)
  assert_trees_close(found, _run(_specification, inputs, segments))


def _low(inputs):
  """Returns the inputs with those of tokens in bfloat16."""

  def low(x):
    return x.astype(jnp.bfloat16) if x.ndim == 3 and x.shape[0] == B else x

  sources = tuple(
      dataclasses.replace(jax.tree.map(low, source), initial_BNE=source.initial_BNE)
      for source in inputs["sources"]
  )
  others = {name: jax.tree.map(low, inputs[name]) for name in ("gates", "epilogue")}
  return {"sources": sources} | others


@pytest.mark.slow
@each_platform
@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.exhaustive), 8])
def test_bfloat16_inputs_keep_float32_states(rank, platform):
  gates = "product" if rank else "array"
  inputs = _low(_inputs(33, 2, "skip z", gates=gates, rank=rank))
  segments = _segments(33, True)
  found = _run(_kernel, inputs, segments, platform=platform)
  expected = _run(_specification, inputs, segments)
  assert found[0][0].dtype == found[0][1].dtype == jnp.float32
  assert_trees_close(found[0], expected[0])
  assert jax.tree.map(jnp.dtype, found[1]) == jax.tree.map(jnp.dtype, expected[1])
  assert_trees_close(found[1], expected[1], "bfloat16")


@pytest.mark.slow
@each_platform
def test_extreme_steps_stay_finite(platform):
  inputs = _inputs(33, 2, "z")
  size = jnp.asarray([1e4, -1e4, 1e-30, 88.0, -88.0, 0.0, 1.0, -1.0] * 4)[None, None]
  rate = -jnp.asarray([1e-3, 1.0, 1e3, 0.0])[:, None]

  def extreme(source):
    dt = size if source.bias_E is not None else jnp.abs(size)
    return dataclasses.replace(
        source,
        dt=jnp.broadcast_to(dt, source.dt.shape),
        a_NE=jnp.broadcast_to(rate, source.a_NE.shape),
    )

  inputs["sources"] = tuple(map(extreme, inputs["sources"]))
  inputs["epilogue"] = Epilogue(z=jnp.broadcast_to(size, (B, 33, 32)))
  for leaf in jax.tree.leaves(_run(_kernel, inputs, _segments(33, False), platform=platform)):
    assert np.isfinite(leaf).all()


@each_platform
def test_only_a_pass_that_is_differentiated_keeps_states(platform):
  sources = _inputs(33, 2, width=128, gates="")["sources"]
  saved = f"f32[{B},3,4,128]"  # Three chunks, N = 4, one block.

  def run(sources):
    return PLATFORMS[platform](sources, (), Epilogue(), None, None, chunk=C, interpret=True)

  assert saved not in str(jax.make_jaxpr(run)(sources))
  assert saved in str(jax.make_jaxpr(lambda sources: jax.vjp(run, sources)[0])(sources))


@each_platform
def test_shapes_that_do_not_agree_are_refused(platform):
  (source,) = _inputs(5, 1, gates="")["sources"]
  for wrong, gates in [
      (dataclasses.replace(source, c_BTN=source.c_BTN[:, :4]), ()),
      (dataclasses.replace(source, gate=0), (_wide(1, 5, 31, 2),)),
  ]:
    with pytest.raises(AssertionError, match="shape"):
      PLATFORMS[platform]([wrong], gates, Epilogue(), None, None)


@pytest.mark.parametrize("finish", PLATFORMS.values(), ids=PLATFORMS)
@pytest.mark.parametrize("change", [
    {"a_NE": lambda x: x[:2]}, {"bias_E": lambda x: x[:1]}, {"x_BTE": lambda x: x[:, :5]},
    {"c_BTN": lambda x: x[:1]}, {"gates": lambda x: (x[0][..., :4],)},
    {"epilogue": lambda x: changed(x, skip=lambda _: None)},
    {"epilogue": lambda x: changed(x, z=lambda z: z[:1])},
    {"epilogue": lambda x: changed(x, moments=lambda _: True)},
    {"resets_BT": lambda x: x[:1]}, {"valid_BT": lambda x: x[:, :3]},
], ids=lambda change: next(iter(change)))
def test_arrays_that_do_not_fit_are_refused(finish, change):
  mask = jnp.ones((B, 7), bool)
  inputs = _inputs(7, 2, "skip x z") | {"resets_BT": ~mask, "valid_BT": mask}
  ((name, of),) = change.items()
  if name in inputs:
    inputs[name] = of(inputs[name])
  else:
    own, last = inputs["sources"]
    inputs["sources"] = own, changed(last, **change)
  with pytest.raises(AssertionError):
    finish(**inputs, interpret=True)

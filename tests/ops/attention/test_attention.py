"""Tests of attention: every form equals the specification, outputs and gradients."""

import functools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dense_jax import sharding
from dense_jax.config import MeshConfig
from dense_jax.errors import InputError
from dense_jax.ops import resolver
from dense_jax.ops.attention import gpu
from dense_jax.ops.attention.blockwise import blockwise_attention
from dense_jax.ops.attention.reference import Documents, softmax_attention
from dense_jax.ops.attention.tpu import splash_attention
from tests.builders import fast_jit, normal
from tests.helpers import ROOT, assert_trees_close, tpu_compiler_environment

B, J, R, N = 2, 2, 3, 8
# Documents whose borders are within blocks and at them; the second row is one document.
_LENGTHS = ([3, 5, 4, 9, 200], [400])


def _inputs(time, before, dtype="float32"):
  """Queries, keys, values and weights of the outputs; their numbers of unit scale."""
  shapes = [(B, time, J * R, N), *[(B, before + time, J, N)] * 2, (B, time, J * R, N)]
  return [normal(seed, *shape).astype(dtype) for seed, shape in enumerate(shapes)]


def _documents(time, before):
  """Documents, of which the first goes on from the positions before; one key there is empty."""
  rows = [np.repeat(np.arange(len(each)), each)[:time] for each in _LENGTHS]
  queries = jnp.asarray(np.stack(rows), jnp.int32)
  cache = jnp.zeros((B, before), jnp.int32).at[:, :1].set(-1)
  return Documents(queries, jnp.concatenate([cache, queries], axis=1))


def _passes(attend, inputs, documents, window):
  """Returns the outputs, and the gradients by queries, keys and values of their weighted sum."""
  q, k, v, weights = inputs

  def objective(q, k, v):
    y = attend(q, k, v, documents, window)
    return jnp.sum(y.astype(jnp.float32) * weights), y

  gradients, y = jax.grad(objective, argnums=(0, 1, 2), has_aux=True)(q, k, v)
  return y, gradients


_everything = fast_jit(_passes, static_argnums=(0, 3))


def _blockwise(block):
  return functools.partial(blockwise_attention, block=block)


_four, _seven = _blockwise(4), _blockwise(7)
_interpreted = functools.partial(splash_attention, interpret=True)


@pytest.mark.parametrize(("time", "before", "window", "packed"), [
    (1, 0, 1, False), (1, 6, 4, True), (4, 0, 9, True), (13, 0, 1, False), (13, 0, 4, True),
    (13, 0, 5, False), (21, 0, 100, True), (21, 8, 8, True), (21, 6, 6, True), (21, 6, 6, False),
    (21, 3, 100, False), (8, 0, 3, False),
])
@pytest.mark.parametrize("attend", [
    _four, pytest.param(_seven, marks=pytest.mark.slow),
    pytest.param(blockwise_attention, marks=pytest.mark.exhaustive),
], ids=["4", "7", "whole"])
def test_blocks_equal_all_scores_at_once(attend, time, before, window, packed):
  inputs = _inputs(time, before)
  documents = _documents(time, before) if packed else None
  actual = _everything(attend, inputs, documents, window)
  assert_trees_close(actual, _everything(softmax_attention, inputs, documents, window))


def test_documents_that_all_rows_share():
  inputs, documents = _inputs(13, 0), _documents(13, 0)
  shared = jax.tree.map(lambda x: x[:1], documents)
  same = jax.tree.map(lambda x: jnp.broadcast_to(x[:1], x.shape), documents)
  assert_trees_close(
      _everything(_four, inputs, shared, 6), _everything(_four, inputs, same, 6)
  )


def test_large_scores_are_exact_and_huge_ones_finite():
  q, k, v, weights = _inputs(13, 0)
  large = [q * 30, k, v, weights]
  actual, expected = (_everything(each, large, None, 13) for each in (_four, softmax_attention))
  assert_trees_close(actual, expected, scale=30)
  huge = _everything(_four, [q * 1e6, k, v, weights], None, 13)
  assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(huge))


def test_bfloat16_is_near_and_its_softmax_is_float32():
  inputs = _inputs(21, 6, "bfloat16")
  documents = _documents(21, 6)
  actual = _everything(_four, inputs, documents, 8)
  exact = [x.astype(jnp.float32) for x in inputs]
  expected = _everything(softmax_attention, exact, documents, 8)
  assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(actual))
  assert_trees_close(actual, expected, "bfloat16", scale=4)
  text = str(jax.make_jaxpr(lambda q, k, v: _four(q, k, v, documents, 8))(*inputs[:3]))
  exponentials = [line for line in text.splitlines() if " exp " in line]
  assert exponentials
  assert all(":f32[" in line for line in exponentials)


def _temporaries(attend, time, window):
  """Bytes of temporaries of a forward and backward pass."""
  inputs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in _inputs(1, 0)]
  inputs = [jax.ShapeDtypeStruct((1, time, *x.shape[2:]), x.dtype) for x in inputs]
  compiled = jax.jit(_passes, static_argnums=(0, 3)).lower(attend, inputs, None, window)
  return compiled.compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("window", [256, 1 << 20])
def test_memory_is_linear_in_the_length(window):
  short, long = (_temporaries(_blockwise(128), time, window) for time in (8192, 16384))
  assert long < 4.2 * short
  assert long < 40 * 8192 * J * R * N * 4


def test_work_grows_with_the_window_and_not_with_the_length():
  """A pass over four times the tokens visits four times the blocks, all others are skipped."""
  def visited(time, window):
    text = str(jax.make_jaxpr(lambda *x: _blockwise(64)(*x, None, window))(*_inputs(time, 0)[:3]))
    return int(text.split("length=")[1].split()[0])

  assert visited(512, 65) == 2 * 8 - 1
  assert visited(2048, 65) == 2 * 32 - 1
  assert visited(512, 512) == 8 * 9 // 2


@pytest.mark.parametrize(("time", "before", "window", "packed"), [
    (130, 0, 70, True), pytest.param(257, 0, 300, False, marks=pytest.mark.slow),
    pytest.param(40, 37, 37, True, marks=pytest.mark.slow),
])
def test_tpu_kernels_equal_the_specification(time, before, window, packed):
  inputs = _inputs(time, before)
  documents = _documents(time, before) if packed else None
  actual = _everything(_interpreted, inputs, documents, window)
  assert_trees_close(actual, _everything(softmax_attention, inputs, documents, window))


@pytest.mark.parametrize(("platform", "dtype", "head_dim", "expected"), [
    ("cpu", "float32", 64, blockwise_attention),
    ("cpu", "bfloat16", 64, blockwise_attention),
    ("gpu", "bfloat16", 64, gpu.cudnn_attention),
    ("gpu", "bfloat16", 68, blockwise_attention),
    ("gpu", "bfloat16", 256, blockwise_attention),
    ("gpu", "float32", 64, blockwise_attention),
    ("tpu", "float32", 64, splash_attention),
])
def test_auto_takes_a_kernel_only_where_it_covers_what_is_asked(
    platform, dtype, head_dim, expected
):
  with resolver.compiling_for(platform):
    assert resolver.attention_function("auto", jnp.dtype(dtype), head_dim) is expected


@pytest.mark.parametrize(("platform", "dtype", "head_dim"), [
    ("cpu", "bfloat16", 64), ("gpu", "float32", 64), ("gpu", "bfloat16", 20),
])
def test_cudnn_is_refused_where_it_does_not_run(platform, dtype, head_dim):
  with resolver.compiling_for(platform), pytest.raises(InputError) as error:
    resolver.attention_function("cudnn", jnp.dtype(dtype), head_dim)
  for part in ("config.model.implementation = 'cudnn'", "blockwise", "bfloat16", "128"):
    assert part in str(error.value)


@pytest.mark.parametrize(("time", "before", "packed", "window", "expected"), [
    (12, 0, None, 5, [True]), (12, 0, None, 12, [True]),
    (12, 0, False, 50, [True, True]), (12, 0, True, 5, [True, True]),
    (13, 0, True, 5, [True]), (12, 6, True, 6, [False]), (12, 5, True, 5, []),
], ids=str)
def test_cudnn_is_asked_where_it_covers_the_rows(
    monkeypatch, time, before, packed, window, expected
):
  """A stand-in computes what is asked of cuDNN by JAX's own form, and notes the causal masks."""
  real, calls = jax.nn.dot_product_attention, []

  def stand_in(*args, implementation, **options):
    assert implementation == "cudnn"
    calls.append(options["is_causal"])
    return real(*args, **options)

  monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
  inputs, documents = _inputs(time, before), None
  if packed is not None:
    documents = _documents(time, before)
    if not packed:
      documents = jax.tree.map(lambda x: 7 * jnp.ones_like(x), documents)
  attend = functools.partial(gpu.cudnn_attention)  # A function that has not been traced yet.
  actual = _everything(attend, inputs, documents, window)
  assert calls == expected
  assert_trees_close(actual, _everything(softmax_attention, inputs, documents, window))


def test_cudnn_makes_no_mask_for_long_rows(monkeypatch):
  calls = []
  monkeypatch.setattr(gpu, "_MASKED_POSITIONS", 10)
  monkeypatch.setattr(
      jax.nn, "dot_product_attention", lambda q, *_, **options: calls.append(options) or q
  )
  inputs, documents = _inputs(12, 0), _documents(12, 0)
  y = gpu.cudnn_attention(*inputs[:3], documents, 64)
  assert len(calls) == 1
  assert "mask" not in calls[0]
  assert_trees_close(y, softmax_attention(*inputs[:3], documents, 64))


@pytest.mark.parametrize("tensor", [2, 4])
def test_tpu_kernels_run_on_each_device_of_a_mesh(tensor):
  """Two devices have a group of heads each; four would split it, and compute block by block."""
  mesh = sharding.make_mesh(MeshConfig(data=8 // tensor, tensor=tensor))
  inputs, documents = _inputs(9, 0), _documents(9, 0)
  inputs = [jnp.concatenate([x, x]) for x in inputs]  # Four rows.
  documents = jax.tree.map(lambda x: jnp.concatenate([x, x]), documents)
  expected = _everything(softmax_attention, inputs, documents, 6)
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    placed = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    actual = jax.jit(_passes, static_argnums=(0, 3))(
        functools.partial(splash_attention, interpret=True),
        *jax.device_put((inputs, documents), placed), 6,
    )
  assert_trees_close(jax.device_get(actual), expected)


VMEM = 128 * 2**20  # Of a v5e.


@pytest.mark.exhaustive
@pytest.mark.tpu_compiler
def test_attention_compiles_for_every_tpu_and_needs_little_memory():
  script = ROOT / "tests" / "ops" / "attention" / "tpu_attention.py"
  result = subprocess.run(
      [sys.executable, script], env=tpu_compiler_environment(), capture_output=True, text=True,
      timeout=600, check=False,
  )
  assert result.returncode == 0, result.stderr[-4000:]
  found = json.loads(result.stdout.splitlines()[-1])
  for form, rows in (("pallas", 13), ("blockwise", 13)):
    short, long = (found[f"{form} v5e {time}"] for time in (8192, 16384))
    # All scores of 16384 tokens would be 512 arrays of the size of q in float32.
    assert long["temporaries"] <= rows * long["row_bytes"], (form, long)
    # Linear in T, but for what the compiler keeps in VMEM, which is more of a short row's arrays.
    assert long["temporaries"] <= 2.2 * (short["temporaries"] + VMEM), (form, short, long)
  # The reason for the resolver's choice on TPUs.
  assert found["pallas v5e 8192"]["bytes"] < 0.5 * found["blockwise v5e 8192"]["bytes"]

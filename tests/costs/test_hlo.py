"""Costs of compiled programs: loops count as often as they run, matmuls count 2 M N K."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from dense_jax.costs.hlo import Cost
from dense_jax.costs.hlo_text import HloError, OpenLoopError, parse_module, parse_shape
from dense_jax.models.params import abstract_model, get_params, with_params
from tests.builders import model_config
from tests.programs import program_cost

TRIPS, ROWS, WIDTH = 10, 16, 32
MATMUL = 2 * ROWS * WIDTH * WIDTH


def cost(function, *arguments, **options) -> Cost:
  return program_cost(jax.jit(function, **options).lower(*arguments).compile().as_text())


def shapes(*dims):
  return [jax.ShapeDtypeStruct(each, jnp.float32) for each in dims]


def layer(x, weight):
  return jnp.tanh(x @ weight), None


def stacked(x, weights, unroll=1, step=layer):
  return jax.lax.scan(step, x, weights, unroll=unroll)[0]


X, WEIGHTS = shapes((ROWS, WIDTH), (TRIPS, WIDTH, WIDTH))


@pytest.mark.parametrize("unroll", [1, TRIPS, 4])  # 4 leaves two iterations outside the loop.
def test_a_loop_counts_as_often_as_it_runs(unroll):
  found = cost(functools.partial(stacked, unroll=unroll), X, WEIGHTS)
  assert found.matmul_flops == found.flops == TRIPS * MATMUL
  assert found.transcendentals == TRIPS * ROWS * WIDTH
  one = cost(lambda x, weight: layer(x, weight)[0], X, *shapes((WIDTH, WIDTH)))
  assert found.flops == TRIPS * one.flops


def test_loops_in_loops_multiply():
  def nested(x, weights):
    return jax.lax.scan(lambda x, _: (stacked(x, weights), None), x, None, length=3)[0]

  assert cost(nested, X, WEIGHTS).matmul_flops == 3 * TRIPS * MATMUL


@pytest.mark.parametrize(
    ("begin", "end", "step"), [(0, 7, 1), (2, 9, 1), (0, 9, 2), (0, 10, 3), (5, 5, 1)]
)
def test_trips_are_found_without_the_compilers_note(begin, end, step):
  def body(carry):
    index, x, weight = carry
    return index + step, jnp.tanh(x @ weight), weight

  def loop(x, weight):
    return jax.lax.while_loop(lambda carry: carry[0] < end, body, (begin, x, weight))[1]

  compiled = jax.jit(loop).lower(X, *shapes((WIDTH, WIDTH))).compile()
  text = compiled.as_text().replace("known_trip_count", "unknown")
  assert program_cost(text).matmul_flops == len(range(begin, end, step)) * MATMUL


def test_a_loop_of_unknown_length_is_an_error():
  def loop(x, weight):
    return jax.lax.while_loop(lambda x: jnp.sum(x) > 1, lambda x: x @ weight, x)

  text = jax.jit(loop).lower(X, *shapes((WIDTH, WIDTH))).compile().as_text()
  with pytest.raises(OpenLoopError, match="the trips of loop while"):
    program_cost(text)
  assert program_cost(text, open_trips=5).matmul_flops == 5 * MATMUL


@pytest.mark.parametrize("remat", [False, True])
def test_gradients_of_a_loop_are_those_of_its_unrolled_twin(remat):
  step = jax.checkpoint(layer) if remat else layer

  def gradients(unroll):
    return jax.grad(
        lambda x, weights: jnp.sum(stacked(x, weights, unroll, step)), argnums=(0, 1)
    )

  scanned, unrolled = cost(gradients(1), X, WEIGHTS), cost(gradients(TRIPS), X, WEIGHTS)
  # One matmul forward and two backward. In the unrolled program the compiler merges all
  # repetitions of remat, or (jax 0.12) some of them.
  assert scanned.matmul_flops == (4 if remat else 3) * TRIPS * MATMUL
  assert 3 * TRIPS * MATMUL <= unrolled.matmul_flops <= scanned.matmul_flops
  assert scanned.flops - scanned.matmul_flops == pytest.approx(
      unrolled.flops - unrolled.matmul_flops, rel=0.05
  )


@pytest.mark.parametrize(
    ("equation", "left", "right", "flops"),
    [
        ("bij,bjk->bik", (5, 16, 32), (5, 32, 8), 2 * 5 * 16 * 32 * 8),
        ("bhij,bhkj->bhik", (2, 3, 16, 32), (2, 3, 8, 32), 2 * 2 * 3 * 16 * 32 * 8),
        ("ij,j->i", (16, 32), (32,), 2 * 16 * 32),
        ("abij,abij->", (2, 3, 16, 32), (2, 3, 16, 32), 2 * 2 * 3 * 16 * 32),
    ],
)
def test_matmuls_with_batches(equation, left, right, flops):
  found = cost(lambda a, b: jnp.einsum(equation, a, b), *shapes(left, right))
  # Without reuse the compiler may replace a dot by products and sums: one operation less per sum.
  assert found.flops == pytest.approx(flops, rel=0.05)


def test_a_conditional_counts_its_most_expensive_branch():
  def either(flag, x, weight):
    return jax.lax.cond(flag, lambda x: x @ weight @ weight, lambda x: x @ weight, x)

  flag = jax.ShapeDtypeStruct((), jnp.bool_)
  assert cost(either, flag, X, *shapes((WIDTH, WIDTH))).matmul_flops == 2 * MATMUL


def test_of_stacked_parameters_a_loop_reads_its_slice():
  found = cost(stacked, X, WEIGHTS)
  weights, carry = 4 * TRIPS * WIDTH * WIDTH, 4 * ROWS * WIDTH
  # The slices are read, written, and read by the matmuls. If each iteration counted the whole
  # stack, it would be ten times as much.
  assert weights <= found.bytes_accessed < 3 * weights + TRIPS * 8 * carry


def test_an_update_in_place_counts_the_update():
  def update(buffer, row):
    return jax.lax.dynamic_update_slice(buffer, row, (3, 0))

  found = cost(update, *shapes((1000, WIDTH), (1, WIDTH)), donate_argnums=0)
  assert found.bytes_accessed <= 3 * 4 * WIDTH


@pytest.mark.parametrize(
    ("name", "kind", "size"),
    [
        ("psum", "all-reduce", 4 * ROWS * WIDTH),
        ("all_gather", "all-gather", 8 * 4 * ROWS * WIDTH),
        ("ppermute", "collective-permute", 4 * ROWS * WIDTH),
        ("psum_scatter", "reduce-scatter", 4 * ROWS * WIDTH),
        ("all_to_all", "all-to-all", 4 * ROWS * WIDTH),
    ],
)
def test_collectives_in_a_loop(name, kind, size):
  mesh = Mesh(np.asarray(jax.devices()[:8]), ("data",))

  def one(x):
    match name:
      case "psum":
        return jax.lax.psum(x, "data")
      case "all_gather":
        return jnp.sum(jax.lax.all_gather(x, "data"), axis=0)
      case "ppermute":
        return jax.lax.ppermute(x, "data", [(i, (i + 1) % 8) for i in range(8)])
      case "psum_scatter":
        return jnp.tile(jax.lax.psum_scatter(x, "data", tiled=True), (8, 1))
      case "all_to_all":
        return jax.lax.all_to_all(x, "data", 0, 0, tiled=True)

  def loop(x):
    return jax.lax.scan(lambda x, _: (jnp.tanh(one(x)), None), x, None, length=TRIPS)[0]

  spec = PartitionSpec("data")
  sharded = jax.shard_map(loop, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
  found = cost(sharded, *shapes((8 * ROWS, WIDTH)))
  assert dict(found.counts) == {kind: TRIPS}
  assert dict(found.sizes) == {kind: TRIPS * size}


@pytest.mark.parametrize(
    ("family", "depth", "inject"), [("gau_retnet", 1, "inputs"), ("mamba2", 0, "state")]
)
def test_a_scanned_model_costs_what_its_unrolled_twin_does(family, depth, inject):
  # Not with state injection: there the compiler merges chunk states that two consecutive layers
  # both compute, but only if it sees both layers, i.e. in the unrolled program.
  tokens = jax.ShapeDtypeStruct((2, 12), jnp.int32)

  def forward(block_layers):
    config = model_config(family, depth, inject, layers=5, block_layers=block_layers)
    model = abstract_model(config)
    return cost(lambda params, tokens: with_params(model, params)(tokens),
                get_params(model), tokens)

  scanned, unrolled = forward(0), forward(5)
  assert scanned.matmul_flops == pytest.approx(unrolled.matmul_flops, rel=0.01)
  assert scanned.flops == pytest.approx(unrolled.flops, rel=0.05)


def convolution(left, right, result, attributes):
  text = f"""HloModule m
ENTRY %main (a: f32[], b: f32[]) -> f32[] {{
  %a = {left} parameter(0)
  %b = {right} parameter(1)
  ROOT %c = {result} convolution(%a, %b), {attributes}
}}
"""
  return program_cost(text).matmul_flops


@pytest.mark.parametrize(
    ("left", "right", "result", "attributes", "flops"),
    [
        # A matmul as the TPU compiler writes it.
        ("bf16[64,32]", "bf16[32,16]", "f32[64,16]", "dim_labels=bf_io->bf", 2 * 64 * 32 * 16),
        # Three taps over ten numbers that are padded by one on both sides: 2 + 8 * 3 + 2 products.
        ("f32[1,10,1]", "f32[3,1,1]", "f32[1,10,1]",
         "window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f", 2 * 28),
        # A short depthwise convolution of 16 channels, padded on the left only.
        ("f32[2,10,16]", "f32[4,1,16]", "f32[2,10,16]",
         "window={size=4 pad=3_0}, dim_labels=b0f_0io->b0f, feature_group_count=16",
         2 * 2 * 16 * (4 * 10 - 6)),
        # Stride 2 and a dilated kernel: taps at offsets 0, 2, 4 from every second of 9 numbers.
        ("f32[1,9,1]", "f32[3,1,1]", "f32[1,3,1]",
         "window={size=3 stride=2 rhs_dilate=2}, dim_labels=b0f_0io->b0f", 2 * 9),
        # The next three are from the program of a Mamba-2 train step for a TPU v5e. A projection
        # whose kernel has the batch as a window, which slides in reverse over padding:
        ("bf16[1024,4384,1]", "bf16[4,2048,1024]", "bf16[4,2048,4384]",
         "window={size=4 pad=3_3 rhs_reversal=1}, dim_labels=fb0_0oi->0fb",
         2 * 4 * 2048 * 1024 * 4384),
        # Batched matmuls, whose batch axes are dilated windows; in the second one, 32 share a
        # kernel.
        ("bf16[4,16,128,128]", "bf16[4,16,128,128]", "f32[4,16,128,128]",
         "window={size=4x16 stride=3x15 lhs_dilate=4x16}, dim_labels=01bf_01oi->01bf",
         2 * 4 * 16 * 128**3),
        ("bf16[4,16,128,32,64]", "bf16[4,16,128,128,1]", "f32[4,16,32,64,128]",
         "window={size=4x16x1 stride=3x15x1 lhs_dilate=4x16x1}, dim_labels=01f2b_01io2->012bf",
         2 * 4 * 16 * 32 * 64 * 128 * 128),
        # Four groups of the batch, each of which uses two of the eight kernels.
        ("f32[4,10,3]", "f32[10,3,8]", "f32[1,1,8]",
         "window={size=10}, dim_labels=b0f_0io->b0f, batch_group_count=4", 2 * 8 * 10 * 3),
    ],
)
def test_convolutions_count_taps_that_meet_numbers(left, right, result, attributes, flops):
  assert convolution(left, right, result, attributes) == flops


# A loop over a stack of weights, as in the text of a TPU program, with abridged layouts.
TPU_LOOP = """HloModule jit_step, is_scheduled=true

%body (p: (s32[], X, STACK)) -> (s32[], X, STACK) {
  %p = (S32, X, /*index=2*/STACK:S(1)) parameter(0)
  %i = S32 get-tuple-element(%p), index=0
  %x = X get-tuple-element(%p), index=1
  %w = STACK:S(1) get-tuple-element(%p), index=2
  %one = S32 constant(1)
  %next = S32 add(%i, %one)
  %y = X fusion(%x, %w, %i), kind=kOutput, calls=%matmul, backend_config={"flag_configs":[]}
  ROOT %r = (S32, X, STACK:S(1)) tuple(%next, %y, %w)
}

%matmul (a: X, b: STACK, c: s32[]) -> X {
  %a = X parameter(0)
  %b = STACK:S(1) parameter(1)
  %c = S32 parameter(2)
  %zero = S32 constant(0)
  %slice = bf16[1,64,64]{2,1,0} dynamic-slice(%b, %c, %zero), dynamic_slice_sizes={1,64,64}
  %flat = bf16[64,64]{1,0:T(8,128)(2,1)} bitcast(%slice)
  ROOT %convolution.1 = X convolution(%a, %flat), dim_labels=bf_io->bf, metadata={op_name="a/(b)"}
}

%condition (p: (s32[], X, STACK)) -> pred[] {
  %p = (S32, X, STACK:S(1)) parameter(0)
  %i = S32 get-tuple-element(%p), index=0
  %four = S32 constant(4)
  ROOT %less = pred[]{:T(512)} compare(%i, %four), direction=LT
}

ENTRY %main (x: X, w: STACK) -> X {
  %x = X parameter(0)
  %w = STACK:S(0) parameter(1)
  %copy-start = (STACK:S(1), STACK:S(0), u32[]{:S(2)}) copy-start(%w)
  %copy-done = STACK:S(1) copy-done(%copy-start)
  %zero = S32 constant(0)
  %t = (S32, X, STACK:S(1)) tuple(%zero, %x, %copy-done)
  %while = (S32, X, STACK:S(1)) while(%t), condition=%condition, body=%body
  ROOT %y = X get-tuple-element(%while), index=1
}
"""


def test_a_loop_as_the_tpu_compiler_writes_it():
  text = TPU_LOOP
  for short, shape in {
      "S32": "s32[]{:T(128)}", "X": "f32[64,64]{1,0:T(8,128)}",
      "STACK:S(1)": "bf16[4,64,64]{2,1,0:T(8,128)(2,1)S(1)}",
      "STACK:S(0)": "bf16[4,64,64]{2,1,0:T(8,128)(2,1)}", "STACK": "bf16[4,64,64]",
  }.items():
    text = text.replace(short, shape)
  found = program_cost(text)
  assert found.matmul_flops == found.flops == 4 * 2 * 64**3
  # The weights are read once, into the chip's own memory. Each iteration moves x and y, and the
  # counter, to which one is added and which the slice reads. The condition, which runs once more
  # than the body, reads the counter too.
  body, condition = 2 * 4 * 64 * 64 + 3 * 4 + 4, 2 * 4 + 1
  assert found.bytes_accessed == 2 * 4 * 64 * 64 + 4 * body + 5 * condition


def test_a_collective_in_several_fusions_counts_once():
  shape, result = "bf16[1,64]{1,0:S(1)}", "bf16[2,64]{1,0}"
  gather = (
      f"{result} all-gather(%p), channel_id=1, replica_groups=[2,2]<=[4], dimensions={{0}}, "
      'backend_config={"async_collective_fusion_config":{"flag_start":"2"}}'
  )
  text = f"""HloModule m

%start (p: bf16[1,64]) -> (bf16[1,64], bf16[2,64]) {{
  %p = {shape} parameter(0)
  %g = {gather}
  ROOT %c = ({shape}, {result}) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}}

%done (p: bf16[1,64], q: bf16[2,64]) -> bf16[2,64] {{
  %p = {shape} parameter(0)
  %q = {result} parameter(1)
  %g = {gather}
  ROOT %c = {result} custom-call(%p, %q, %g), custom_call_target="AsyncCollectiveDone"
}}

ENTRY %main (p: bf16[1,64]) -> bf16[2,64] {{
  %p = {shape} parameter(0)
  %s = ({shape}, {result}) fusion(%p), kind=kCustom, calls=%start
  %a = {shape} get-tuple-element(%s), index=0
  %b = {result} get-tuple-element(%s), index=1
  ROOT %d = {result} fusion(%a, %b), kind=kCustom, calls=%done
}}
"""
  found = program_cost(text)
  assert (dict(found.counts), dict(found.sizes)) == ({"all-gather": 1}, {"all-gather": 256})
  assert found.bytes_accessed == 256


def test_a_kernel_costs_what_its_author_says():
  text = (
      "HloModule m\nENTRY %main (x: f32[8,128]) -> f32[8,128] {\n"
      "  %x = f32[8,128]{1,0} parameter(0)\n"
      '  ROOT %k = f32[8,128]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", '
      'backend_config={"custom_call_config":{"body":"TUzvUg","cost_estimate":{"flops":"5000",'
      '"transcendentals":"70","bytes_accessed":"8192"}}}\n}\n'
  )
  found = program_cost(text)
  assert (found.flops, found.matmul_flops, found.transcendentals) == (5000, 0, 70)
  assert found.bytes_accessed == 8192
  assert program_cost(text.replace("cost_estimate", "other")).bytes_accessed == 2 * 4 * 8 * 128


def test_shapes():
  shape = parse_shape("(f32[2,3]{1,0:T(8,128)S(1)}, (s4[5]{0}, pred[]), token[])")
  assert [leaf.dims for leaf in shape.leaves] == [(2, 3), (5,), (), ()]
  assert [leaf.space for leaf in shape.leaves] == [1, 0, 0, 0]
  assert (shape.bytes, shape.main_bytes) == (24 + 3 + 1, 3 + 1)


@pytest.mark.parametrize("text", ["", "HloModule m\n\n%a (x: f32[]) -> f32[] {\n}\n"])
def test_a_text_without_an_entry_is_an_error(text):
  with pytest.raises(HloError, match="no entry"):
    parse_module(text)


def test_line_breaks_in_a_kernels_attributes_do_not_end_its_computation():
  text = '''HloModule m

ENTRY %main (x: f32[4,8]) -> f32[4,8] {
  %x = f32[4,8]{1,0} parameter(0)
  %kernel = f32[4,8]{1,0} custom-call(%x), custom_call_target="t", frontend_attributes={a={
"b":"{\\"c\\": 1}"
}}, metadata={op_name="k"}
  ROOT %root = f32[4,8]{1,0} add(%kernel, %x)
}
'''
  module = parse_module(text)
  assert module.computations["main"].root == "root"
  assert program_cost(text).bytes_accessed == (2 + 3) * 4 * 8 * 4

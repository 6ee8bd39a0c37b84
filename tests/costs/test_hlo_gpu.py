"""Costs of programs as the compiler for GPUs writes them: libraries' calls, kernels, launches."""

import pathlib

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from dense_jax.costs import largest
from dense_jax.costs.hlo import program_items, total
from dense_jax.costs.hlo_text import HloError, parse_module
from dense_jax.ops.kernel_cost import KernelCost
from tests.programs import program_cost

# A scanned product of matrices, abridged: a fusion with a matmul, a call of a kernel, a scalar.
TEXT = (pathlib.Path(__file__).parent / "gpu_loop.hlo").read_text()
GEMM_BYTES = 2 * (64 * 32 + 32 * 16 + 64 * 16)


def test_a_loop_of_a_matmul_and_a_kernel():
  found = program_cost(TEXT)
  gemm = 2 * 64 * 32 * 16
  assert (found.matmul_flops, found.flops) == (10 * (gemm + 700), 10 * (gemm + 1000))
  assert found.transcendentals == 10 * 30
  assert found.bytes_accessed == 10 * (GEMM_BYTES + 5000 + 3 * 4)
  # The matmul, the kernel and the counter. No kernel evaluates the condition of a known count.
  assert found.launches == 10 * 3
  derived = program_cost(TEXT.replace("known_trip_count", "other"))
  assert (derived.matmul_flops, derived.launches) == (found.matmul_flops, 10 * 3 + 11)


def test_the_largest_instructions_and_their_lines():
  items = program_items(TEXT)
  assert total(items) == program_cost(TEXT)
  gemm, kernel = largest.instructions(items, 2)
  # A fusion without a line of its own has that of the instruction in it; libraries are left out.
  assert gemm.lines == "layers/linear.py:97 < me/run.py:18"
  assert (gemm.bytes, gemm.runs, gemm.phase) == (10 * GEMM_BYTES, 10, "backward")
  assert gemm.what == "gemm_fusion bf16[64,16] body/dot_general"
  assert (kernel.lines, kernel.bytes, kernel.phase) == ("me/run.py:18", 50_000, "forward")
  by_line = largest.lines(items * 2, 1)
  assert [(each.lines, each.bytes, each.runs) for each in by_line] == [
      (gemm.lines, 2 * gemm.bytes, 20)
  ]


def test_lines_as_older_programs_write_them():
  text = (
      "HloModule m\nENTRY %main (x: f32[8]) -> f32[8] {\n  %x = f32[8]{0} parameter(0)\n"
      '  ROOT %y = f32[8]{0} negate(%x), metadata={op_name="jit(f)/PASS/neg" '
      'source_file="/a/b/c.py" source_line=12}\n}\n'
  )
  assert parse_module(text).frames == {}
  for scopes, phase in {
      "add": "forward", "jvp()/while": "forward",
      "transpose(jvp())/while/body/checkpoint": "backward",
      "transpose(jvp())/checkpoint/rematted_computation": "again",
      "transpose(jvp())/while/body/jvp()": "again",
      "transpose(jvp())/while/body/transpose(jvp())": "backward",
  }.items():
    (entry,) = largest.instructions(program_items(text.replace("PASS", scopes)), 5)
    assert (entry.lines, entry.phase) == ("b/c.py:12", phase)


def test_line_breaks_in_attributes_hide_nothing():
  text = """HloModule m
ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  ROOT %kernel = f32[8]{0} custom-call(%x), custom_call_target="k", frontend_attributes={a={
"b":"{\\"c\\": 1}"
}}, metadata={op_name="f/kernel_cost[matmul_flops=3,flops=5,bytes_accessed=9]/pallas_call"}
}
"""
  found = program_cost(text)
  assert (found.matmul_flops, found.flops, found.bytes_accessed) == (3, 5, 9)
  assert parse_module(text).computations["main"].root == "kernel"


def call(operands, result, target, attributes):
  names = [f"p{index}" for index in range(len(operands))]
  lines = [f"  %{name} = {shape} parameter({index})"
           for index, (name, shape) in enumerate(zip(names, operands, strict=True))]
  used = ", ".join(f"%{name}" for name in names)
  return "\n".join([
      "HloModule m", "ENTRY %main () -> f32[] {", *lines,
      f'  ROOT %c = {result} custom-call({used}), {attributes}custom_call_target="{target}"', "}",
  ])


SCORES = '"intermediate_tensor_shape": {"dimensions": ["2", "16", "1024", "1024"]}'


@pytest.mark.parametrize(
    ("operands", "result", "target", "attributes", "flops", "moved"),
    [
        (["bf16[4,256,512]", "bf16[4,512,128]"], "(bf16[4,256,128], s8[4194304])",
         "__cublas$lt$matmul",
         'backend_config={"dot_dimension_numbers":{"lhs_contracting_dimensions":["2"]}}, ',
         2 * 4 * 256 * 512 * 128, 2 * 4 * (256 * 512 + 512 * 128 + 256 * 128)),
        (["bf16[1,10,1]", "bf16[1,3,1]"], "(bf16[1,10,1], u8[64])", "__cudnn$convForward",
         "window={size=3 pad=1_1}, dim_labels=b0f_o0i->b0f, ", 2 * 28, 2 * (10 + 3 + 10)),
        (["bf16[2,1024,16,64]"] * 3, "(bf16[2,16,1024,64], u8[0])", "__cudnn$fmhaSoftmax",
         f'backend_config={{{SCORES}, "mask_type": "CAUSAL"}}, ',
         2 * 2 * 2 * 16 * 1024 * 1024 * 64 / 2, 4 * 2 * 2 * 1024 * 16 * 64),
        (["bf16[2,1024,16,64]"] * 4, f"({'bf16[2,16,1024,64], ' * 3}u8[0])",
         "__cudnn$fmhaSoftmaxBackward",
         f'backend_config={{{SCORES}, "sliding_window_length": 128}}, ',
         5 * 2 * 2 * 16 * 1024 * 128 * 64, 7 * 2 * 2 * 1024 * 16 * 64),
    ],
)
def test_calls_of_libraries(operands, result, target, attributes, flops, moved):
  found = program_cost(call(operands, result, target, attributes))
  assert found.matmul_flops == found.flops == flops
  assert found.bytes_accessed == moved


def test_an_unknown_call_of_a_library_is_an_error():
  with pytest.raises(HloError, match=r"c calls __cudnn\$norm, whose operations are not known"):
    program_cost(call(["f32[8]"], "(f32[8], u8[0])", "__cudnn$norm", ""))


@pytest.mark.parametrize("transform", [lambda f: f, jax.checkpoint, jax.grad])
def test_a_kernels_cost_is_in_the_name_of_its_operation(transform):
  """The scope is kept by gradients and rematerialisation; the kernel is interpreted here."""
  cost = KernelCost(matmul_flops=10, flops=5, transcendentals=2, bytes_accessed=64)
  assert cost.estimate() == pl.CostEstimate(flops=15, transcendentals=2, bytes_accessed=64)

  def double(x_ref, y_ref):
    y_ref[...] = 2 * x_ref[...]

  @jax.custom_vjp
  def doubled(x):
    with cost.scope():
      return pl.pallas_call(double, out_shape=x, interpret=True)(x)

  doubled.defvjp(lambda x: (x, None), lambda _, d_y: (doubled(d_y),))
  function = transform(lambda x: jnp.sum(doubled(x)))
  text = jax.jit(function).lower(jnp.ones(8)).as_text(debug_info=True)
  assert "kernel_cost[matmul_flops=10,flops=15,transcendentals=2,bytes_accessed=64]" in text

"""Compiles programs for TPUs and GPUs without any, and tells whether they fit.

The compilers (libtpu; jax's CUDA plugin) run on any Linux x86-64 machine. They report how much of a
chip's memory a program takes and which operations it executes, but not how long they take.
"""

import dataclasses
import importlib.metadata
import os
import platform
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dense_jax import sharding
from dense_jax.batch import Segments
from dense_jax.config import ExperimentConfig, defaults, invalid
from dense_jax.costs.chips import Bound, Estimate, bound, estimate
from dense_jax.costs.hlo import Cost, Item, program_items, total
from dense_jax.costs.hlo_text import OpenLoopError
from dense_jax.data import prepared
from dense_jax.data.synthetic.tasks import names, resolve
from dense_jax.data.tokenizer import ByteTokenizer
from dense_jax.evaluation.perplexity import Scorer
from dense_jax.models.language_model import LanguageModel, ModelState
from dense_jax.models.params import (
    abstract_model,
    decoding_params,
    get_params,
    logical_axes,
    with_params,
)
from dense_jax.ops import resolver
from dense_jax.runs.compile_targets import topology_chip, topology_devices
from dense_jax.training.step import Trainer
from dense_jax.types import Array, Params, PyTree

PROGRAMS = ("train", "eval", "prefill", "decode")

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"([\d.]+)([KMGT]?)"
_REFUSALS = (
    rf"Used {_SIZE} of {_SIZE} hbm",
    rf"memory required for HLO temporaries \({_SIZE}\) exceeds available HBM \({_SIZE}\)",
)


@dataclasses.dataclass(frozen=True)
class Memory:
  """A program's use of one chip's memory (HBM), in bytes.

  Attributes:
    arguments, temporaries, outputs: the sizes of each; None means that the compiler refused the
      program. Outputs that reuse an argument's memory count in both.
    peak: the most that is in use at one time; if the compiler refused the program, the size that
      its error gives.
    capacity: the chip's memory.
  """

  arguments: int | None
  temporaries: int | None
  outputs: int | None
  peak: int
  capacity: int


@dataclasses.dataclass(frozen=True)
class Figures:
  """The figures that a compiler and its program give, for one chip.

  Attributes:
    compile_seconds: the time that lowering and compiling took.
    compile_cpu_seconds: the processor time of it, of all threads and of the compiler's own
      processes. On a machine that does other work too, it says more than the time.
    memory: the use of a chip's memory.
    cost: operations, bytes, launches and collectives; None means that the compiler refused the
      program.
    bound: lower bounds of the run time, in seconds, by the chip's published peaks; None like cost.
    estimate: the run time, in seconds, by measured ceilings; None like cost, and for TPUs.
    note: what `cost` leaves out; "" if nothing.
    items: the instructions that `cost` adds up.
  """

  compile_seconds: float
  compile_cpu_seconds: float
  memory: Memory
  cost: Cost | None
  bound: Bound | None
  estimate: Estimate | None
  note: str
  items: list[Item] = dataclasses.field(repr=False)

  @property
  def fits(self) -> bool:
    """True if the program fits a chip's memory."""
    return self.cost is not None and self.memory.peak <= self.memory.capacity


@dataclasses.dataclass(frozen=True)
class CompiledProgram(Figures):
  """A run's program that was compiled for a topology, with the figures of one chip.

  Attributes:
    config: the run's configuration, with the size of the vocabulary.
    topology: the chips, such as "v5p:4x4x4".
    mesh: axis -> number of devices.
    program: one of `PROGRAMS`.
    chips: the number of chips.
  """

  config: ExperimentConfig
  topology: str
  mesh: dict[str, int]
  program: str
  chips: int

  def as_dict(self) -> dict[str, Any]:
    """Returns the figures as a dict of JSON values."""
    cost = self.cost
    return {
        "fits": self.fits,
        "chips": self.chips,
        "compile_seconds": round(self.compile_seconds, 1),
        "compile_cpu_seconds": round(self.compile_cpu_seconds, 1),
        "hbm": dataclasses.asdict(self.memory),
        "flops": cost and cost.flops,
        "matmul_flops": cost and cost.matmul_flops,
        "transcendentals": cost and cost.transcendentals,
        "bytes_accessed": cost and cost.bytes_accessed,
        "launches": cost and cost.launches,
        "collectives": cost and [dataclasses.asdict(each) for each in cost.collectives],
        "bound": self.bound and dataclasses.asdict(self.bound),
        "estimate": self.estimate and dataclasses.asdict(self.estimate),
        "note": self.note,
        "program": self.program,
        "topology": self.topology,
        "mesh": self.mesh,
        "versions": _versions(topology_chip(self.topology).is_gpu),
        "config": defaults(self.config),
    }


def compile_program(
    config: ExperimentConfig,
    topology: str,
    program: str = "train",
    *,
    say: Callable[[str], None] = lambda _: None,
) -> CompiledProgram:
  """Compiles a program of a run for a topology.

  Args:
    config: the run's configuration. Its mesh must fit the topology; see `fit_mesh`. A vocabulary
      of 0 means that of the tokenizer, if its size is known.
    topology: the chips, such as "v5p:4x4x4" or "h100:8".
    program: "train" (a step), "eval" (the losses of a batch), "prefill" (a prompt of
      data.seq_len tokens) or "decode" (one token), all of train.batch_size rows.
    say: called with the name of each phase when it begins.

  Raises:
    InputError: there is no such topology, the mesh does not divide it or the model, the size of
      the vocabulary is unknown, or the topology's compiler is not installed.
  """
  config = with_vocab(config)
  devices = topology_devices(topology)
  mesh = sharding.make_mesh(config.mesh, devices)
  figures = _compile(lambda: _lower(config, mesh, program), mesh, topology, say)
  fields = {field.name: getattr(figures, field.name) for field in dataclasses.fields(Figures)}
  return CompiledProgram(
      **fields, config=config, topology=topology, mesh=dict(mesh.shape), program=program,
      chips=len(devices),
  )


def compile_function(
    function: Callable[..., Any], arguments: Sequence[PyTree], topology: str
) -> Figures:
  """Compiles a function for the first chip of a topology.

  Args:
    function: a function of arrays.
    arguments: its arguments, as arrays or `jax.ShapeDtypeStruct`.
    topology: the chips, such as "v5e:2x2" or "h100:1".

  Raises:
    InputError: there is no such topology, or its compiler is not installed.
  """
  mesh = Mesh(np.asarray(topology_devices(topology)[:1]), ("device",))
  here = NamedSharding(mesh, PartitionSpec())
  shapes = jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), tuple(arguments)
  )
  return _compile(lambda: jax.jit(function).lower(*shapes), mesh, topology)


def _compile(
    lower: Callable[[], Any], mesh: Mesh, topology: str, say: Callable[[str], None] = lambda _: None
) -> Figures:
  """Lowers and compiles a program whose arguments are on the mesh, which is of the topology."""
  chip = topology_chip(topology)
  begin, cpu_begin = time.monotonic(), _cpu_seconds()
  say("lowering")
  known = jax.sharding.use_abstract_mesh(mesh.abstract_mesh)
  with resolver.compiling_for("gpu" if chip.is_gpu else "tpu"), known:
    lowered = lower()
  say("compiling")
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    memory = Memory(None, None, None, _refused(error), chip.memory)
    took = time.monotonic() - begin, _cpu_seconds() - cpu_begin
    return Figures(*took, memory, None, None, None, "", [])
  took = time.monotonic() - begin, _cpu_seconds() - cpu_begin
  stats = compiled.memory_analysis()
  memory = Memory(
      stats.argument_size_in_bytes, stats.temp_size_in_bytes, stats.output_size_in_bytes,
      stats.peak_memory_in_bytes, chip.memory,
  )
  say("reading")
  items, note = _items(compiled.as_text())
  cost = total(items)
  return Figures(*took, memory, cost, bound(cost, chip), estimate(cost, chip), note, items)


def _cpu_seconds() -> float:
  """Returns the processor time so far of this process and of those that it has waited for."""
  return sum(os.times()[:4])


def with_vocab(config: ExperimentConfig) -> ExperimentConfig:
  """Returns the configuration with the vocabulary size that its tokenizer will have."""
  kind, task = config.data.tokenizer, config.data.task
  if task.exists:
    own = len(names(resolve(task)))
  elif prepared.is_prepared(config.data):
    own = prepared.vocab_size(config.data)
  else:
    sizes = {"bytes": ByteTokenizer.vocab_size, "train": config.data.vocab_size}
    own = sizes.get(kind, 0)
  size = config.model.vocab_size or own
  if not size:
    raise invalid("config.model.vocab_size", 0, f"the number of pieces of the tokenizer {kind}")
  return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=size))


def _versions(gpu: bool) -> dict[str, str]:
  compiler = "jax-cuda13-plugin" if gpu else "libtpu"
  return {
      "python": platform.python_version(),
      "jax": jax.__version__,
      compiler: importlib.metadata.version(compiler),
  }


def _items(text: str) -> tuple[list[Item], str]:
  """Returns what the program executes, and a note that says what that leaves out."""
  try:
    return program_items(text), ""
  except OpenLoopError as error:
    # For example, time-invariant layers loop over the documents of the fullest chunk.
    return program_items(text, open_trips=1), f"loops whose length is data count once: {error}"


def _refused(error: jax.errors.JaxRuntimeError) -> int:
  """Returns the bytes that the compiler's refusal names; raises any other error again."""
  message = str(error)
  for pattern in _REFUSALS if "RESOURCE_EXHAUSTED" in message else ():
    if found := re.search(pattern, message):
      return round(float(found[1]) * _UNITS[found[2]])
  raise error


def _lower(config: ExperimentConfig, mesh: Mesh, program: str) -> Any:
  """Lowers the program for the mesh."""
  batch_size, seq_len = config.train.batch_size, config.data.seq_len
  if program in ("train", "eval"):
    trainer = Trainer(config, mesh)
    batch = trainer.batch_shapes(batch_size, seq_len)
    if program == "train":
      return _jitted(trainer.train_step).lower(trainer.state_shapes, batch)
    scorer = Scorer(trainer.model, chunk=config.train.loss_chunk)
    return _jitted(scorer.score).lower(trainer.state_shapes.params, batch)

  # Generation compiles every layer apart.
  sharding.check_batch(batch_size, seq_len, 1, mesh)
  unrolled = dataclasses.replace(config.model, block_layers=config.model.layers)
  model = abstract_model(unrolled)
  params = _decoding_params(model, mesh)
  rows = sharding.rows_sharding(mesh)

  def prefill(params: Params, tokens_BT: Array, segments: Segments) -> tuple[ModelState, Array]:
    return with_params(model, params).prefill(tokens_BT, segments)

  def step(params: Params, state: ModelState, tokens_B: Array) -> tuple[ModelState, Array]:
    return with_params(model, params).step(state, tokens_B)

  if program == "prefill":
    tokens: Any = jax.ShapeDtypeStruct(
        (batch_size, seq_len), jnp.int32, sharding=sharding.batch_sharding(mesh)
    )
    return jax.jit(prefill).lower(params, tokens, Segments(tokens, tokens))
  state: PyTree = jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=rows),
      jax.eval_shape(lambda p: with_params(model, p).init_state(batch_size), params),
  )
  options = resolver.decoding_options()
  return jax.jit(step, donate_argnums=1, compiler_options=options).lower(
      params, state, jax.ShapeDtypeStruct((batch_size,), jnp.int32, sharding=rows)
  )


def _jitted(function: Any) -> Any:
  """Returns a jitted function, typed as Any: its annotation does not show that it is jitted."""
  return function


def _decoding_params(model: LanguageModel, mesh: Mesh) -> PyTree:
  """Returns the shapes of the parameters that generation uses, with their shardings."""
  params = jax.eval_shape(
      lambda params: decoding_params(with_params(model, params)), get_params(model)
  )
  shardings = sharding.param_shardings(
      logical_axes(model), {name: leaf.shape for name, leaf in params.items()}, mesh
  )
  return {
      name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=shardings[name])
      for name, leaf in params.items()
  }

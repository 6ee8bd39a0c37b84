"""Memory: what the machine has, what a run has used, and what a run needs before it starts."""

import contextlib
import dataclasses
import os
import pathlib
import resource
import sys

import jax
import jax.numpy as jnp

from dense_jax.config import ExperimentConfig, defaults, invalid
from dense_jax.errors import InputError
from dense_jax.formatting import scaled
from dense_jax.models.params import abstract_model, count_params, get_params

_CGROUP_LIMIT = pathlib.Path("/sys/fs/cgroup/memory.max")


def host_memory() -> int:
  """Returns the bytes of this machine's memory, or of its container's limit if that is lower."""
  memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  with contextlib.suppress(OSError, ValueError):  # No container, or one without a limit.
    memory = min(memory, int(_CGROUP_LIMIT.read_text()))
  return memory


def device_memory() -> int:
  """Returns the bytes of memory of all devices together.

  If the devices report no memory of their own, it is that of all hosts together.
  """
  limits = [(device.memory_stats() or {}).get("bytes_limit") for device in jax.local_devices()]
  own = sum(limit or 0 for limit in limits) if all(limits) else host_memory()
  return own * jax.process_count()


def peak_memory() -> int:
  """Returns the largest resident set size that this process has had, in bytes."""
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak if sys.platform == "darwin" else peak * 1024


def check_memory(config: ExperimentConfig) -> None:
  """Refuses a run if one of its minimum needs exceeds the memory that there is.

  The needs are, each compared by itself:

  - on all devices together: one copy of the float32 parameters, the gradients, AdamW's moments, and
    the parameters' average if the run keeps one;
  - on all devices together, for one of the `train.accumulate` parts of a batch: the inputs of the
    layers that the backward pass keeps, and the logits of one chunk;
  - on all hosts together: the tokens of a batch.

  A run that passes may still not fit; `dense_jax.cli.compile` tells.

  Raises:
    InputError: a need exceeds the memory; the error names the sizes, the need and the memory.
  """
  model, train, optimizer = config.model, config.train, config.optimizer
  moments = (optimizer.first_moment_dtype, optimizer.second_moment_dtype)
  per_parameter = 4 + 4 + sum(jnp.dtype(dtype).itemsize for dtype in moments)
  per_parameter += 4 if train.ema else 0
  available = device_memory()
  # Begin with a lower bound, the embedding and one norm of each layer, because tracing many layers
  # takes long. If it fits, count exactly, with scanned layers, which are traced once.
  parameters = model.width * (model.vocab_size + model.layers)
  if parameters * per_parameter <= available:
    scanned = dataclasses.replace(model, block_layers=0)
    parameters = count_params(get_params(abstract_model(scanned)))
  if parameters * per_parameter > available:
    sizes = {name: getattr(model, name) for name in ("width", "layers", "vocab_size")}
    sizes |= {f"mixer.{name}": value for name, value in defaults(model.mixer).items()}
    named = ", ".join(
        f"config.model.{name} = {value}" for name, value in sizes.items() if type(value) is int
    )
    raise InputError(
        f"a model of these sizes is not valid here: {named}. Its {parameters:,} parameters or "
        f"more, with gradients and optimizer, take {scaled(parameters * per_parameter, 'B')}: "
        f"expected at most the {scaled(available, 'B')} that the devices have together"
    )
  seq_len, rows = config.data.seq_len, train.batch_size // train.accumulate
  kept = 1 if model.remat == "full" else model.layers
  activations = rows * (
      kept * seq_len * model.width + min(train.loss_chunk, seq_len) * model.vocab_size
  )
  _check_rows(
      config, activations * jnp.dtype(model.dtype).itemsize, available, "activations and logits"
  )
  check_batch(config, host_memory() * jax.process_count())


def check_batch(config: ExperimentConfig, memory: int) -> None:
  """Refuses a batch whose tokens do not fit into so many bytes of memory.

  Raises:
    InputError: they do not; the error names the sizes, the need and the memory.
  """
  batch = config.train.batch_size * config.data.seq_len * 17  # Of a token, four int32 and a bool.
  _check_rows(config, batch, memory, "the tokens of a batch")


def _check_rows(config: ExperimentConfig, needed: int, memory: int, what: str) -> None:
  if needed > memory:
    train = config.train
    raise invalid(
        "config.train.batch_size", train.batch_size,
        f"fewer rows, more parts (config.train.accumulate = {train.accumulate}), or a shorter "
        f"config.data.seq_len than {config.data.seq_len}: {what} take {scaled(needed, 'B')}, and "
        f"there are {scaled(memory, 'B')}",
    )

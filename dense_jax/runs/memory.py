"""Memory: what there is, what a run has used, and what it needs before any of it is made."""

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
from dense_jax.models.params import abstract_model, count_params, get_params
from dense_jax.runs.formatting import scaled

_CGROUP_LIMIT = pathlib.Path("/sys/fs/cgroup/memory.max")


def host_memory() -> int:
  """Bytes of this machine's memory, or of the container's share of it."""
  memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  with contextlib.suppress(OSError, ValueError):  # No container, or one without a limit.
    memory = min(memory, int(_CGROUP_LIMIT.read_text()))
  return memory


def device_memory() -> int:
  """Bytes of all devices together; where they have none of their own, of all hosts together."""
  limits = [(device.memory_stats() or {}).get("bytes_limit") for device in jax.local_devices()]
  own = sum(limit or 0 for limit in limits) if all(limits) else host_memory()
  return own * jax.process_count()


def peak_memory() -> int:
  """The largest resident set that this process has had, in bytes."""
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak if sys.platform == "darwin" else peak * 1024


def check_memory(config: ExperimentConfig) -> None:
  """Refuses a run that cannot fit, by what it needs at least.

  Counted are, over all devices, one copy of the float32 parameters, their gradients and AdamW's
  moments; of a part of the batch, what enters each layer that the backward pass keeps and one
  chunk's logits; and on the host a batch's tokens. What passes may still not fit;
  `dense_jax.cli.compile` tells.

  Raises:
    InputError: naming the sizes, what they need and what there is.
  """
  model, train, optimizer = config.model, config.train, config.optimizer
  moments = (optimizer.first_moment_dtype, optimizer.second_moment_dtype)
  per_parameter = 4 + 4 + sum(jnp.dtype(dtype).itemsize for dtype in moments)
  available = device_memory()
  # Names of parameters do not matter here, and a scan over layers is described at once. The
  # embedding and each layer's norms come first, as describing many layers takes long.
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
  batch = train.batch_size * seq_len * 17  # Four int32 and a bool for each token.
  for needed, memory, what in (
      (activations * jnp.dtype(model.dtype).itemsize, available, "activations and logits"),
      (batch, host_memory() * jax.process_count(), "the tokens of a batch"),
  ):
    if needed > memory:
      raise invalid(
          "config.train.batch_size", train.batch_size,
          f"fewer rows, more parts (config.train.accumulate = {train.accumulate}), or a shorter "
          f"config.data.seq_len than {seq_len}: {what} take {scaled(needed, 'B')}, and there are "
          f"{scaled(memory, 'B')}",
      )


"""A training command for TPU slices, checked before anything costs money."""

import argparse
import dataclasses
import pathlib
import re
import shlex
from collections.abc import Sequence

from etils import epath
from jax.sharding import AbstractMesh

from dense_jax import experiment, sharding
from dense_jax.cli import common
from dense_jax.config import DataConfig, EvalConfig, invalid
from dense_jax.costs.chips import CHIPS
from dense_jax.evaluation.tasks import parse_names
from dense_jax.files import is_remote
from dense_jax.runs.profiling import Profile
from dense_jax.training.checkpoint import check_name

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Prefix of a TPU type's name -> (generation, units per chip): the number in the name counts
# TensorCores, of which a chip has two, or chips.
_GENERATIONS = {"v4": ("v4", 2), "v5litepod": ("v5e", 1), "v5p": ("v5p", 2), "v6e": ("v6e", 1)}
_FLAT_SIZES = (1, 4, 8, 16, 32, 64, 128, 256)
_TYPES = (
    f"v5litepod-N or v6e-N with N chips ({', '.join(map(str, _FLAT_SIZES))}), or v4-N or v5p-N "
    "with N TensorCores (two a chip; a multiple of 8)"
)


@dataclasses.dataclass(frozen=True)
class TpuType:
  """A type of TPU slice.

  Attributes:
    name: Cloud TPU's name of it, such as v5litepod-16.
    generation: the chip's name in `dense_jax.costs.chips`, such as v5e.
    chips: the number of chips, each of which is one jax device.
  """

  name: str
  generation: str
  chips: int

  @property
  def topology(self) -> str:
    """The topology for `dense_jax.cli.compile`, such as v5e:4x4; "" if it is not known.

    It is known for powers of two, which are arranged as nearly in a square or a cube as possible.
    """
    doublings = self.chips.bit_length() - 1
    if 1 << doublings != self.chips:
      return ""
    axes = CHIPS[self.generation].axes
    # If the axes differ, the last ones are the longest.
    exponents = [(doublings + axis) // axes for axis in range(axes)]
    if self.chips == 4 and axes == 3:
      exponents = [1, 1, 0]
    return f"{self.generation}:{'x'.join(str(1 << exponent) for exponent in exponents)}"


def parse_tpu_type(name: str) -> TpuType:
  """Parses Cloud TPU's name of a type of slice, such as v5litepod-16.

  Raises:
    InputError: there is no such type.
  """
  prefix, _, count = name.partition("-")
  if prefix in _GENERATIONS and re.fullmatch(r"[1-9]\d*", count):
    generation, cores = _GENERATIONS[prefix]
    chips = int(count) // cores
    flat = CHIPS[generation].axes == 2
    if chips in _FLAT_SIZES if flat else int(count) % 8 == 0:
      return TpuType(name, generation, chips)
  raise invalid("--tpu-type", name, _TYPES)


@dataclasses.dataclass(frozen=True)
class Job:
  """A training command, which is the same on every worker.

  Attributes:
    experiment: FILE.py[:ARG], with the file relative to the project's folder.
    workdir: gs://BUCKET/..., shared by all workers.
    overrides: pairs of a dotted key without "config." and its value as text.
    allow_change: keys that may differ from those of the run in `workdir`.
    environment: environment variables to set on the workers.
    tpu_type: the type of each slice.
    slices: the number of slices.
    batch_size: rows of a training step, of all slices together.
  """

  experiment: str
  workdir: str
  overrides: tuple[tuple[str, str], ...]
  allow_change: tuple[str, ...]
  environment: dict[str, str]
  tpu_type: TpuType
  slices: int
  batch_size: int

  @property
  def arguments(self) -> list[str]:
    """The arguments of `dense_jax.cli.train`."""
    changes = [f"--config.{key}={value}" for key, value in self.overrides]
    if self.allow_change:
      changes.append(f"--allow-change={','.join(self.allow_change)}")
    return ["--config", self.experiment, "--workdir", self.workdir, *changes]

  def command(self, python: str) -> str:
    """Returns the shell command line that trains, to be run in a worker's copy of the project.

    Args:
      python: the interpreter, as shell text that is not quoted.
    """
    return f"{python} -m dense_jax.cli.train {shlex.join(self.arguments)}"

  def compile_command(self) -> str:
    """Returns a command that checks, without a TPU, whether training fits a slice's memory.

    The command compiles the part of a step that runs on one slice. "" means that the topology is
    not known.
    """
    if not self.tpu_type.topology:
      return ""
    changes = [f"--config.{key}={value}" for key, value in self.overrides]
    if self.slices > 1:
      changes.append(f"--config.train.batch_size={self.batch_size // self.slices}")
    return shlex.join([
        "python", "-m", "dense_jax.cli.compile", "--config", self.experiment,
        "--topology", self.tpu_type.topology, *changes,
    ])


def add_tpu_type_argument(parser: argparse.ArgumentParser) -> None:
  """Adds --tpu-type."""
  parser.add_argument("--tpu-type", required=True, metavar="TYPE",
                      help="what each slice is, such as v6e-16, v5litepod-64, v5p-128")


def add_slices_argument(parser: argparse.ArgumentParser) -> None:
  """Adds --slices."""
  parser.add_argument("--slices", type=int, default=1, metavar="N",
                      help="slices that train together (default 1)")


def add_job_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds --config, --workdir and --env."""
  parser.add_argument("--config", required=True, metavar="FILE.py[:ARG]", help="an experiment")
  parser.add_argument("--workdir", required=True, metavar="gs://BUCKET/...",
                      help="where the run is kept")
  common.add_allow_change_argument(parser)
  parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE",
                      help="set in each worker's environment; shown, so no secrets")


def check_slices(slices: int) -> int:
  """Returns the number of slices.

  Raises:
    InputError: it is below 1.
  """
  if slices < 1:
    raise invalid("--slices", slices, "an integer >= 1")
  return slices


def parse_job(options: argparse.Namespace, overrides: Sequence[tuple[str, str]]) -> Job:
  """Makes the job that a command line describes, and checks everything that needs no TPU.

  Args:
    options: the options of a parser with the arguments of all three functions above.
    overrides: changes of the configuration: pairs of a dotted key without "config." and text.

  Raises:
    InputError: the TPU type, slices, experiment, overrides, mesh, batch, workdir, paths of data,
      tasks or environment variables are not valid, or a profile is asked for.
  """
  tpu_type = parse_tpu_type(options.tpu_type)
  slices = check_slices(options.slices)
  config = experiment.load(options.config, overrides)
  devices = tpu_type.chips * slices
  sizes = sharding.mesh_sizes(config.mesh, devices, slices)
  sharding.check_batch(
      config.train.batch_size, config.data.seq_len, config.train.accumulate,
      AbstractMesh(tuple(sizes.values()), tuple(sizes)),
  )
  if not re.fullmatch(r"gs://[^/]+/.+", options.workdir):
    raise invalid("--workdir", options.workdir, "gs://BUCKET/..., as workers share no disk")
  workdir = epath.Path(options.workdir)
  check_name(workdir, "--workdir")
  Profile(workdir, config.watch)  # Raises an error if it would be written into the bucket.
  _check_data(config.data)
  _check_tasks(config.eval)
  for key, value in overrides:
    if not value.isprintable():
      raise invalid(f"config.{key}", value, "text in one line")
  return Job(
      _relative(options.config), options.workdir, tuple(overrides),
      tuple(common.allowed_changes(options, config)), _environment(options.env), tpu_type, slices,
      config.train.batch_size,
  )


def _check_data(config: DataConfig) -> None:
  """Raises InputError for paths of data that cannot be used on a worker."""
  _check_everywhere("config.data.path", config.path, "stdlib")
  _check_everywhere("config.data.heldout_path", config.heldout_path, "")
  _check_everywhere("config.data.tokenizer", config.tokenizer, "train", "bytes")
  for field, path in {"path": config.path, "heldout_path": config.heldout_path}.items():
    if is_remote(path) and "**" in path:
      raise invalid(f"config.data.{field}", path, "a glob without ** where files are in a bucket")
  if config.mixtures() and not config.path.startswith("/"):
    raise invalid(
        "config.data.mixture", config.mixture, "empty, unless config.data.path is a corpus at an "
        "absolute path that each worker has",
    )
  if is_remote(config.cache_dir):
    raise invalid("config.data.cache_dir", config.cache_dir, "a local directory")


def _check_tasks(config: EvalConfig) -> None:
  """Raises InputError for tasks that cannot be scored on a worker."""
  if config.tasks:
    parse_names(config.tasks, "config.eval.tasks")
    _check_everywhere("config.eval.data", config.data)


def _check_everywhere(field: str, value: str, *words: str) -> None:
  """Raises InputError for a path that may exist on this machine only."""
  if value not in words and not re.match(r"gs://[^/]|/", value):
    known = ", ".join(word for word in words if word)
    raise invalid(
        field, value,
        f"{known + ', ' if known else ''}gs://BUCKET/... or an absolute path that each worker has",
    )


def _relative(spec: str) -> str:
  """Returns an experiment's FILE.py[:ARG] with the file relative to the project's folder."""
  name, colon, argument = spec.partition(":")
  file = pathlib.Path(name).resolve()
  if not file.is_relative_to(ROOT):
    raise invalid("--config", spec, f"an experiment below {ROOT}, which is what workers have")
  return file.relative_to(ROOT).as_posix() + colon + argument


def _environment(pairs: Sequence[str]) -> dict[str, str]:
  environment = {}
  for pair in pairs:
    name, equals, value = pair.partition("=")
    # Quotes and backslashes would break the quoting that other programs put around a value.
    if not equals or not re.fullmatch(r"[A-Za-z_]\w*", name) or not value.isprintable() or (
        set(value) & set("\"'\\")
    ):
      raise invalid("--env", pair, "NAME=VALUE in one line, without quotes and backslashes")
    environment[name] = value
  return environment

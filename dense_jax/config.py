"""Configuration as frozen dataclasses that validate themselves.

One definition serves all: `defaults` turns a dataclass into the nested dict that an
experiment file edits (as an `ml_collections.ConfigDict`), `build` turns the edited dict
back, and every error names the key, the value and what would be valid. Below `build`
a configuration is an object with typed attributes, never a dict.
"""

import dataclasses
import difflib
import math
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from dense_jax.errors import InputError

ConfigT = TypeVar("ConfigT")

LARGEST = 2**31 - 1  # Steps, tokens and sizes are int32 on devices.
LARGEST_SEED = 2**32 - 1  # jax takes a seed's low 32 bits: a larger one would be a smaller one.


def _field(default: Any, valid: str, check: Callable[[Any], bool]) -> Any:
  return dataclasses.field(default=default, metadata={"valid": valid, "check": check})


def choice(default: str, *options: str) -> Any:
  """A field whose value is one of `options`."""
  return _field(default, "one of " + ", ".join(options), lambda value: value in options)


def integer(default: int, low: int, high: int = LARGEST) -> Any:
  """A field whose value is an integer in [low, high]."""
  return _field(default, f"an integer >= {low} and <= {high}", lambda v: low <= v <= high)


def number(
    default: float, low: float, high: float = math.inf, *, open_low: bool = False,
    open_high: bool = False,
) -> Any:
  """A field whose value is a finite number in [low, high]; an open end is left out."""
  valid = f"a number {'>' if open_low else '>='} {low:g}"
  valid += "" if math.isinf(high) else f" and {'<' if open_high else '<='} {high:g}"
  above = float.__gt__ if open_low else float.__ge__
  below = float.__lt__ if open_high else float.__le__
  return _field(default, valid, lambda v: math.isfinite(v) and above(v, low) and below(v, high))


def invalid(key: str, value: Any, valid: str) -> InputError:
  """The error of a value that is not valid, in one wording."""
  return InputError(f"{key} = {value!r} is not valid: expected {valid}")


def unknown_key(key: str, known: list[str]) -> InputError:
  """The error of a key that does not exist, naming the nearest one that does."""
  parent, _, name = key.rpartition(".")
  near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
  prefix = parent + "." if parent else ""
  hint = f"; did you mean {prefix + near[0]}?" if near else "."
  return InputError(f"unknown key {key}{hint} Valid keys: {', '.join(prefix + k for k in known)}")


def defaults(config: Any) -> dict[str, Any]:
  """A config dataclass (or its class, for its defaults) as a nested plain dict."""
  instance = config() if isinstance(config, type) else config
  return dataclasses.asdict(instance)


def field_types(cls: type) -> dict[str, Any]:
  """The fields of a config dataclass and their annotated types."""
  hints = typing.get_type_hints(cls)
  return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def _typed(key: str, value: Any, annotation: Any) -> Any:
  """`value` as `annotation`; an int is also a float, nothing else is converted."""
  if annotation is float and type(value) is int and abs(value) < 2**1023:  # A float holds it.
    return float(value)
  if not isinstance(value, annotation) or (isinstance(value, bool) and annotation is not bool):
    raise invalid(key, value, f"a value of type {annotation.__name__}")
  return value


def build(
    cls: type[ConfigT],
    values: Mapping[str, Any],
    key: str = "config",
    variants: Mapping[str, type] | None = None,
) -> ConfigT:
  """Builds and validates a config dataclass from a nested dict.

  Args:
    cls: the dataclass.
    values: its fields' values; a field that is missing takes its default.
    key: the dotted path of `values`, for error messages.
    variants: dotted path -> the dataclass to build there, for the fields whose class
      depends on another field (``config.model.mixer`` on the family).

  Raises:
    InputError: an unknown key, a wrong type, a value out of range.
  """
  variants = variants or {}
  types = field_types(cls)
  for name in values:
    if name not in types:
      raise unknown_key(f"{key}.{name}", list(types))
  built = {}
  for field in dataclasses.fields(cls):  # type: ignore[arg-type]  # ConfigT is a dataclass
    if field.name not in values:
      continue
    path, value = f"{key}.{field.name}", values[field.name]
    nested: Any = variants.get(path, types[field.name])
    if isinstance(nested, type) and dataclasses.is_dataclass(nested):
      if not isinstance(value, Mapping):
        raise invalid(path, value, f"the keys {', '.join(field_types(nested))}")
      built[field.name] = build(nested, value, path, variants)
      continue
    built[field.name] = _typed(path, value, types[field.name])
    if field.metadata and not field.metadata["check"](built[field.name]):
      raise invalid(path, value, field.metadata["valid"])
  return cls(**built)


@dataclasses.dataclass(frozen=True)
class DenseConfig:
  """Dense hidden connections (arXiv 2403.00818); `docs/dense.md` says which to use when.

  Attributes:
    depth: m, how many of the layers directly below each dense layer reads; 0 is the base
      model.
    start: the first dense layer; layer 0 has nothing below it.
    stride: every stride-th layer from `start` on is dense.
    inject: "state" fuses what is read from the shallow layers' states (equations 3 and 4
      of the design); "inputs" fuses the inputs of the state (equation 5, the released
      DenseRetNet).
    source: what is read of a shallow layer, its "raw" states (or inputs) or its "fused"
      ones, which hold what it read itself. Fused states need depth 1 and cost one read for
      each layer below; fused inputs cost nothing.
    transition: the selective transition's projection of a shallow state: "identity";
      "linear", a map over the state axis for each source; "mlp", h + U silu(V h), which no
      lazy read can serve and which is therefore slow.
    transition_rank: R of "mlp".
    gate: the selective transition's gate: "none", "channel" (of a read's channels) or
      "channel_state" (of the state axis too).
    gate_sharing: one gate "shared" by all sources, or one "per_source".
    gate_reduction: the gate's bottleneck is D / gate_reduction.
    gate_init: "zeros" starts the gate's last matrix at zero.
    fusion: how the reads of the sources join the layer's own: "add", "concat" (a linear map
      over the concatenated states), "gated" (a mixture for each channel) or "attention"
      (over the sources).
    input_norm: with inject "inputs", RMSNorm after the fusion, as released. Without it a
      gate of zero leaves the base model exactly.
  """

  depth: int = integer(0, 0)
  start: int = integer(1, 1)
  stride: int = integer(1, 1)
  inject: str = choice("state", "state", "inputs")
  source: str = choice("raw", "raw", "fused")
  transition: str = choice("identity", "identity", "linear", "mlp")
  transition_rank: int = integer(8, 1)
  gate: str = choice("channel", "none", "channel", "channel_state")
  gate_sharing: str = choice("shared", "shared", "per_source")
  gate_reduction: int = integer(32, 1)
  gate_init: str = choice("zeros", "zeros", "normal")
  fusion: str = choice("add", "add", "concat", "gated", "attention")
  input_norm: bool = True

  def __post_init__(self) -> None:
    if self.inject == "inputs":
      self._require("with inject=inputs, which adds vectors and reads no states",
                    transition=("identity",), gate=("none", "channel"), fusion=("add",))
    elif self.source == "fused":
      self._require("with inject=state and source=fused, a chain of linear reads",
                    depth=(0, 1), transition=("identity", "linear"), fusion=("add",))

  def _require(self, why: str, **valid: tuple[object, ...]) -> None:
    for name, options in valid.items():
      value = getattr(self, name)
      if value not in options:
        raise invalid(
            f"config.model.dense.{name}", value, f"{' or '.join(map(str, options))} {why}"
        )

  def sources(self, layer: int) -> int:
    """S of a layer: how many layers it reads."""
    dense = layer >= self.start and (layer - self.start) % self.stride == 0
    return min(layer, self.depth) if dense else 0


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """One language model.

  Attributes:
    family: a key of `dense_jax.models.registry.FAMILIES`.
    vocab_size: V; 0 takes the tokenizer's.
    width: D.
    layers: L.
    tie_embeddings: the head is the embedding's transpose.
    norm_eps: of every RMSNorm.
    dtype: of activations and matmuls. Parameters, decays, states, norms' statistics and
      the loss are float32 whatever it is.
    block_layers: layers of a super-block, the body of the scan over layers; 0 takes
      max(m, 1), or the next multiple of dense.stride. With `layers`, every layer is
      compiled apart.
    remat: what the backward pass computes again: "none"; "minimal", all but matmuls of a
      super-block; "reads", all but each layer's input and what dense connections read of it,
      one layer at a time; "full", all but what enters a super-block, and then in it as "reads".
    implementation: the recurrence's form, see `dense_jax.ops.dispatch`.
    chunk: C of the chunked forms; 0 takes the form's own.
    dense: the dense connections.
    mixer: the family's own options.
  """

  family: str = "mamba"
  vocab_size: int = integer(0, 0)
  width: int = integer(256, 1)
  layers: int = integer(4, 1, 2**16)
  tie_embeddings: bool = True
  norm_eps: float = number(1e-5, 0, open_low=True)
  dtype: str = choice("float32", "float32", "bfloat16")
  block_layers: int = integer(0, 0)
  remat: str = choice("none", "none", "minimal", "reads", "full")
  implementation: str = choice(
      "auto", "auto", "associative", "chunked", "conv", "pallas", "recurrent", "softmax"
  )
  chunk: int = integer(0, 0)
  dense: DenseConfig = dataclasses.field(default_factory=DenseConfig)
  mixer: Any = None

  def __post_init__(self) -> None:
    if self.dense.depth >= self.layers:
      raise invalid(
          "config.model.dense.depth", self.dense.depth,
          f"an integer from 0 to layers - 1 = {self.layers - 1}",
      )
    if self.dense.depth and self.dense.start >= self.layers:
      raise invalid(
          "config.model.dense.start", self.dense.start,
          f"an integer from 1 to layers - 1 = {self.layers - 1}",
      )
    if self.block_layers in (0, self.layers) or not self.dense.depth:
      return
    if self.dense.inject == "state" and self.dense.source == "fused":
      raise invalid(
          "config.model.block_layers", self.block_layers,
          f"0 or layers = {self.layers} with inject=state and source=fused: each layer reads "
          "another number of states",
      )
    if self.block_layers < self.dense.depth or self.block_layers % self.dense.stride:
      raise invalid(
          "config.model.block_layers", self.block_layers,
          f"0, layers, or a multiple of dense.stride = {self.dense.stride} that is >= "
          f"dense.depth = {self.dense.depth}",
      )


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Text, tokens and batches.

  Attributes:
    path: "stdlib" (the sources of Python's standard library), or a file, directory or
      glob of .txt (one document, of at most 1 GiB), .jsonl (a `text` field in each line, of at
      most 128 MiB), .jsonl.gz, .jsonl.zst; gs://BUCKET/... is one too. In directories and globs,
      names that begin with a dot are passed over, links are followed, and each real file is read
      once. Text is UTF-8, or UTF-16 or UTF-32 with a byte order mark.
    heldout_path: held-out text, in the same forms; empty holds out a part of `path`.
    heldout_every: every n-th file is held out; of fewer than n files every n-th document; of
      fewer than n documents the last 1/n of the text.
    seq_len: T, tokens a row.
    tokenizer: "train" (SentencePiece, trained on the training text and cached), "bytes",
      or the path of a SentencePiece .model file.
    vocab_size: pieces of a trained tokenizer.
    cache_dir: where trained tokenizers, tokenized text and digests of text files are kept
      between runs; a local directory.
  """

  path: str = "stdlib"
  heldout_path: str = ""
  heldout_every: int = integer(20, 2)
  seq_len: int = integer(256, 1)
  tokenizer: str = "train"
  vocab_size: int = integer(4096, 300)
  cache_dir: str = "~/.cache/dense_jax"


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """AdamW and its learning-rate schedule.

  Attributes:
    learning_rate: the peak.
    schedule: after a linear warm-up: "cosine"; "wsd" (warm-up, stable, linear decay);
      "polynomial"; "constant".
    warmup_fraction: of all steps.
    decay_fraction: of all steps, the decay of "wsd".
    power: of "polynomial".
    final_fraction: of the peak, at the last step.
    weight_decay: decoupled; which parameters decay: `dense_jax.training.optimizer`.
    clip_norm: the gradient's global norm is clipped to it; 0 does not clip.
    first_moment_dtype, second_moment_dtype: in which AdamW's moments are kept between
      updates. A bfloat16 second moment needs beta2 <= 0.99: a moving average that changes by
      less than its last bit stands still.
  """

  learning_rate: float = number(1e-3, 0, open_low=True)
  schedule: str = choice("cosine", "cosine", "wsd", "polynomial", "constant")
  warmup_fraction: float = number(0.05, 0, 1)
  decay_fraction: float = number(0.2, 0, 1)
  power: float = number(1.0, 0, open_low=True)
  final_fraction: float = number(0.1, 0, 1)
  beta1: float = number(0.9, 0, 1, open_high=True)
  beta2: float = number(0.95, 0, 1, open_high=True)
  epsilon: float = number(1e-8, 0, open_low=True)
  weight_decay: float = number(0.1, 0)
  clip_norm: float = number(1.0, 0)
  first_moment_dtype: str = choice("float32", "float32", "bfloat16")
  second_moment_dtype: str = choice("float32", "float32", "bfloat16")

  def __post_init__(self) -> None:
    if self.second_moment_dtype == "bfloat16" and self.beta2 > 0.99:
      raise invalid(
          "config.optimizer.second_moment_dtype", self.second_moment_dtype,
          f"float32 with beta2 = {self.beta2:g}, or beta2 <= 0.99",
      )
    if self.schedule == "wsd" and self.warmup_fraction + self.decay_fraction > 1:
      raise invalid(
          "config.optimizer.decay_fraction", self.decay_fraction,
          f"a number <= 1 - warmup_fraction = {1 - self.warmup_fraction:g}",
      )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """The training run.

  Attributes:
    steps: optimizer steps.
    batch_size: sequences a step, over all devices and accumulation steps.
    accumulate: the batch is computed in this many parts, one after the other.
    z_loss: weight of mean(log Z ** 2), which keeps logits from drifting; 0 is none.
    loss_chunk: tokens of a row whose logits exist at one time.
    log_every, eval_every, checkpoint_every: steps; the last step always does all three.
    layer_metrics_every: steps between those that measure what layers record; 0 measures none.
    eval_batches: held-out batches of an evaluation during training; 0 takes all.
    keep_last, keep_best: checkpoints kept: the newest, and the best by held-out loss.
  """

  steps: int = integer(1000, 1)
  batch_size: int = integer(8, 1)
  accumulate: int = integer(1, 1)
  z_loss: float = number(0.0, 0)
  loss_chunk: int = integer(256, 1)
  log_every: int = integer(10, 1)
  layer_metrics_every: int = integer(0, 0)
  eval_every: int = integer(500, 1)
  eval_batches: int = integer(16, 0)
  checkpoint_every: int = integer(500, 1)
  keep_last: int = integer(2, 1)
  keep_best: int = integer(1, 0)

  def __post_init__(self) -> None:
    if self.batch_size % self.accumulate:
      raise invalid(
          "config.train.accumulate", self.accumulate,
          f"a divisor of train.batch_size = {self.batch_size}",
      )


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Devices by axis; one may be -1, which takes what is left.

  Attributes:
    slices: groups of devices that only a slower network joins (TPU slices), each with its part
      of the batch; 0 takes what the devices say.
    data: replicas of the parameters, each with its part of the batch.
    fsdp: parts of the parameters, which also divide the batch.
    sequence: parts of each row's tokens.
    tensor: parts of heads and channels.
  """

  slices: int = integer(0, 0)
  data: int = integer(-1, -1)
  fsdp: int = integer(1, -1)
  sequence: int = integer(1, -1)
  tensor: int = integer(1, -1)


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
  """All that defines a run; what an experiment file edits."""

  seed: int = integer(0, 0, LARGEST_SEED)
  model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
  data: DataConfig = dataclasses.field(default_factory=DataConfig)
  optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
  train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
  mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)

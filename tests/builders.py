"""Tiny models with perturbed parameters, documents in packed rows, batches."""

import dataclasses
import functools
from collections.abc import Collection, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dense_jax.batch import Batch, Segments
from dense_jax.config import DenseConfig, ModelConfig, field_types
from dense_jax.models.language_model import LanguageModel, ModelState
from dense_jax.models.params import abstract_model, get_params, with_params
from dense_jax.models.registry import family as find_family
from dense_jax.types import Array, Params, PyTree

VOCAB = 11
# Family -> the mixer's options in a tiny model, where its defaults will not do.
MIXERS: dict[str, dict[str, object]] = {
    "mamba": {"state_size": 3, "conv_width": 4, "dt_rank": 2},
    "gau_retnet": {},
    "mamba2": {"state_size": 3, "head_dim": 8, "groups": 2},
    "s4d": {"state_size": 4, "ffn_width": 24, "init": "inv"},
    "s4": {"state_size": 4, "ffn_width": 24},
    "retnet": {"heads": 2, "key_dim": 12, "ffn_width": 24},
    "transformer": {"heads": 4, "kv_heads": 2, "context": 7, "ffn_width": 24},
}
FAMILIES = tuple(MIXERS)


def _of_form(*forms: str) -> tuple[str, ...]:
  return tuple(family for family in FAMILIES if find_family(family).form in forms)


# Families whose states deeper layers may read, and those whose inputs they may fuse.
STATE_FAMILIES = _of_form("diagonal", "matrix", "lti")
INPUT_FAMILIES = _of_form("diagonal", "matrix")
# Each runs another family's form, at its price or more: `make test-exhaustive` has most of them.
TWINS = ("retnet", "s4")
# A test that all families have is slow for these: one of each form that is not quick.
SLOW_FAMILIES = ("s4d", "transformer")
# Those whose programs compile in a few seconds: a recurrence by channels, one by heads.
QUICK_FAMILIES = ("mamba", "gau_retnet")


def _marks(case: object, quick: Collection, slow: Collection) -> tuple[pytest.MarkDecorator, ...]:
  return () if case in quick else (pytest.mark.slow if case in slow else pytest.mark.exhaustive,)


def _with_families(families: Sequence[str]) -> pytest.MarkDecorator:
  return pytest.mark.parametrize("family", [
      pytest.param(family, marks=_marks(family, QUICK_FAMILIES, SLOW_FAMILIES))
      for family in families
  ])


each_family, each_state_family = _with_families(FAMILIES), _with_families(STATE_FAMILIES)
# Kinds of models that the equivalences are about: (family, m, injection). All options of all
# families are in tests/models/test_equality_matrix.py.
KINDS = [
    *(
        (family, depth, inject)
        for family in ("mamba", "gau_retnet")
        for depth, inject in (
            (0, "state"), (1, "state"), (2, "state"), (1, "inputs"), (2, "inputs"),
        )
    ),
    ("mamba2", 0, "state"), ("mamba2", 2, "state"), ("mamba2", 2, "inputs"),
    ("retnet", 2, "state"), ("s4d", 2, "state"), ("transformer", 0, "state"),
]


def kind_name(kind: tuple[str, int, str]) -> str:
  """A test's id, such as mamba-m2-state."""
  name, depth, inject = kind
  return f"{name}-m{depth}-{inject}" if depth else f"{name}-m0"


QUICK_KINDS = (("mamba", 2, "state"), ("gau_retnet", 2, "inputs"))
SLOW_KINDS = (("s4d", 2, "state"), ("transformer", 0, "state"))


def with_kinds(kinds: list[tuple[str, int, str]]) -> pytest.MarkDecorator:
  """For each of these kinds of models, a test."""
  return pytest.mark.parametrize("kind", [
      pytest.param(kind, id=kind_name(kind), marks=_marks(kind, QUICK_KINDS, SLOW_KINDS))
      for kind in kinds
  ])


each_kind = with_kinds(KINDS)

# The tests' time is compilation: without LLVM's optimisation it takes half as long.
COMPILER_OPTIONS = {"xla_backend_optimization_level": 0}
# Of jax 0.10's two compilers of fusions the newer one takes longer; jax 0.11 has no other.
OLD_EMITTERS = {"xla_cpu_use_fusion_emitters": False} if jax.__version_info__ < (0, 11) else {}
fast_jit = functools.partial(jax.jit, compiler_options=COMPILER_OPTIONS | OLD_EMITTERS)


def model_config(
    family: str, depth: int = 0, inject: str = "state", **options: object
) -> ModelConfig:
  """A tiny model; each option goes to the model, its mixer or its dense connections.

  Chunks are shorter than sequences, ranks larger than one, and the head is not tied.
  """
  mixer_class = find_family(family).config
  values = {
      "vocab_size": VOCAB, "width": 16, "layers": max(2, depth + 1), "chunk": 3,
      "tie_embeddings": False, "gate_reduction": 4, "depth": depth, "inject": inject,
  }
  values |= MIXERS[family] | options

  def take(cls: type) -> dict[str, object]:
    return {name: values.pop(name) for name in list(values) if name in field_types(cls)}

  mixer, dense = mixer_class(**take(mixer_class)), DenseConfig(**take(DenseConfig))
  return ModelConfig(family=family, mixer=mixer, dense=dense, **values)


def random_params(config: ModelConfig, seed: int = 0) -> Params:
  """Parameters that are all away from their initial values, of unit-scale activations.

  Gates are not zero, norms and D not one, transitions not the identity, biases not zero.
  """
  rng = np.random.default_rng(seed)
  params = {}
  shapes = get_params(abstract_model(config))
  # The order of the draws is part of what tests were made with.
  for name in sorted(shapes, key=lambda name: (name.startswith("stack.prefix_layers."), name)):
    leaf = shapes[name]
    noise = rng.standard_normal(leaf.shape)
    match name.rpartition(".")[2]:
      case "kernel" | "head":
        value = noise / np.sqrt(leaf.shape[-2])
      case "embedding":
        value = noise
      case "scale" | "d":
        value = 1 + 0.3 * noise
      case "a_log":
        value = np.log(np.arange(1, leaf.shape[0] + 1)).reshape(-1, *(1,) * (leaf.ndim - 1))
        value = value + 0.3 * noise
      case "dt_bias":
        value = 0.5 * noise - 1
      case "bias":
        value = 0.3 * noise
      case "log_a" | "log_dt":
        value = 0.5 * noise - 1
      case "a_imag" | "p" | "b" | "c":
        value = noise
      case "linear":  # of a dense connection, started at the identity
        value = np.eye(leaf.shape[-1]) + 0.3 * noise
      case "down" | "up":  # of the low-rank transition
        value = noise / np.sqrt(leaf.shape[-2])
      case _:
        raise AssertionError(f"say in tests/builders.py what {name} is to be")
    params[name] = jnp.asarray(value, jnp.float32)
  return {name: params[name] for name in shapes}


def random_model(config: ModelConfig, seed: int = 0) -> LanguageModel:
  """A model of `random_params`."""
  return with_params(abstract_model(config), random_params(config, seed))


def with_options(model: LanguageModel, **options: object) -> LanguageModel:
  """The same parameters in a model of another form (options of ModelConfig)."""
  config = dataclasses.replace(model.config, **options)
  return with_params(abstract_model(config), get_params(model))


def normal(seed: int, *shape: int, scale: float = 1.0) -> Array:
  """Float32 Gaussian numbers."""
  return jnp.asarray(scale * np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def random_like(tree: PyTree, seed: int) -> PyTree:
  """Gaussian numbers in the tree's shapes and dtypes."""
  leaves, structure = jax.tree.flatten(tree)
  rng = np.random.default_rng(seed)
  return structure.unflatten(
      [jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype) for leaf in leaves]
  )


def where_cache(mask_BC: Array, chosen: PyTree, other: PyTree) -> PyTree:
  """Slots of an attention's caches, [..., B, C, J, N]; the mask's C may be 1."""
  def where(left: Array, right: Array) -> Array:
    return jnp.where(mask_BC.reshape((1,) * (left.ndim - 4) + mask_BC.shape + (1, 1)), left, right)

  return jax.tree.map(where, chosen, other)


def random_state(model: LanguageModel, positions: list[int], seed: int = 1) -> ModelState:
  """A state as it might be before those positions of the rows.

  Slots of an attention's cache that no position has written are zero.
  """
  position_B = jnp.asarray(positions, jnp.int32)
  layers = random_like(jax.eval_shape(lambda: model.init_state(len(positions))).layers, seed)
  if model.config.family == "transformer":
    written_BC = jnp.arange(model.config.mixer.context)[None] < position_B[:, None]
    layers = where_cache(written_BC, layers, jax.tree.map(jnp.zeros_like, layers))
  return ModelState(position_B, layers)


def random_tokens(seed: int, *shape: int) -> Array:
  """Token ids."""
  return jnp.asarray(np.random.default_rng(seed).integers(0, VOCAB, shape), jnp.int32)


def packed(
    rows: list[list[int]], *, time: int = 0, first: list[int] | None = None
) -> Segments:
  """Rows of documents' lengths, padded on the right to `time` or the longest row.

  Args:
    rows: each row's documents' lengths.
    time: T; 0 takes the longest row's.
    first: the position at which each row begins: above 0 it goes on with a document.
  """
  time = time or max(sum(row) for row in rows)
  positions, ids = np.zeros((2, len(rows), time), np.int32)
  for index, row in enumerate(rows):
    begin = 0
    for number, length in enumerate(row):
      offset = first[index] if first and not number else 0
      positions[index, begin : begin + length] = offset + np.arange(length)
      ids[index, begin : begin + length] = number + 1
      begin += length
  return Segments(jnp.asarray(positions), jnp.asarray(ids))


def random_batch(segments: Segments, seed: int = 0) -> Batch:
  """Random tokens in those documents, each predicting the next of its document."""
  ids = np.asarray(segments.ids_BT)
  tokens = np.asarray(random_tokens(seed, ids.shape[0], ids.shape[1] + 1))
  mask = np.zeros(ids.shape, bool)
  mask[:, :-1] = (ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] != 0)
  return Batch(
      jnp.asarray(tokens[:, :-1]), jnp.asarray(tokens[:, 1:]), jnp.asarray(mask), segments
  )


def tree_dot(left: PyTree, right: PyTree) -> Array:
  """The sum of all products."""
  return sum(jax.tree.leaves(jax.tree.map(lambda a, b: jnp.sum(a * b), left, right)), start=0.0)

"""Digests of arrays: their definition, what they notice, and that they know no mesh."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dense_jax.config import MeshConfig
from dense_jax.models.params import by_layer, init_params
from dense_jax.sharding import make_mesh
from dense_jax.training.proof import ArrayProof, Proof, digest_json, prove
from tests.builders import model_config

MASK = 2**32 - 1


def mixed(value):
  """MurmurHash3's finalizer, of a Python integer."""
  value = ((value ^ value >> 16) * 0x85EBCA6B) & MASK
  value = ((value ^ value >> 13) * 0xC2B2AE35) & MASK
  return value ^ value >> 16


def digest(words):
  """The definition, of unsigned integers in row-major order."""
  places = [mixed((index * 0x9E3779B1 + 1) & MASK) for index in range(len(words))]
  terms = [mixed(int(word) ^ place) for word, place in zip(words, places, strict=True)]
  seconds = [term * (place | 1) for term, place in zip(terms, places, strict=True)]
  return f"{sum(terms) & MASK:08x}{sum(seconds) & MASK:08x}"


def proof_of(array):
  arrays, infinite = prove({"a": array})
  assert not infinite
  return arrays["a"]


RNG = np.random.default_rng(0)


@pytest.mark.parametrize(("array", "words"), [
    (jnp.asarray(7, jnp.int32), np.uint32([7])),
    (jnp.arange(6, dtype=jnp.float32).reshape(2, 3), np.arange(6, dtype=np.float32).view("u4")),
    (jnp.asarray([1.5, -2.0], jnp.bfloat16), np.uint16([0x3FC0, 0xC000])),
    (jnp.asarray([1, -1, 5], jnp.int8), np.uint8([1, 255, 5])),
    (jnp.asarray([True, False]), [1, 0]),
    (jnp.asarray([1 + 2j], jnp.complex64), np.float32([1, 2]).view("u4")),
    (jnp.zeros((0, 3)), []),
    (jax.random.key(5), np.uint32([0, 5])),
])
def test_a_digest_is_its_definition(array, words):
  words = np.asarray(words).ravel()
  assert proof_of(array) == ArrayProof(str(array.dtype), array.shape, digest(words))


def test_each_flipped_bit_is_noticed():
  words = RNG.integers(0, 2**32, 33, dtype=np.uint32)
  whole = proof_of(jnp.asarray(words)).digest
  seen = {whole}
  for index in range(words.size):
    for bit in range(32):
      other = words.copy()
      other[index] ^= np.uint32(1) << np.uint32(bit)
      seen.add(proof_of(jnp.asarray(other)).digest)
  assert len(seen) == 1 + 33 * 32


def test_what_sums_of_bits_would_miss_is_noticed():
  values = jnp.asarray(RNG.standard_normal(64), jnp.float32)
  others = [
      values[::-1], jnp.roll(values, 1), values.at[:2].multiply(-1), values.at[3].set(values[4])
      .at[4].set(values[3]), values.at[60:].set(0), jnp.zeros(64), values.reshape(8, 8),
  ]
  proofs = {proof_of(values), *map(proof_of, others)}
  assert len(proofs) == 1 + len(others)


@pytest.mark.parametrize("spec", [("fsdp", None), (None, "fsdp"), (("data", "fsdp"), None), ()])
def test_a_digest_knows_no_mesh(spec):
  array = jnp.asarray(RNG.standard_normal((16, 24)), jnp.float32)
  mesh = make_mesh(MeshConfig(data=2, fsdp=4))
  placed = jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))
  assert proof_of(placed) == proof_of(array)


@pytest.mark.parametrize("block_layers", [1, 2, 4])
def test_stacked_layers_have_the_digests_of_single_ones(block_layers):
  config = model_config("gau_retnet", layers=4, block_layers=block_layers)
  params = init_params(config, jax.random.key(0))
  found, infinite = prove({"params": params}, config)
  assert not infinite
  alone, _ = prove({"params": by_layer(config, params)})
  assert found == alone and len(found) > 4


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_named(bad):
  broken = jnp.asarray([1, bad], jnp.bfloat16)
  tree = {"whole": jnp.ones(3), "broken": broken, "n": jnp.ones(2, int)}
  arrays, infinite = prove(tree)
  assert infinite == ["broken"] and arrays.keys() == tree.keys()


PROOF = Proof(3, {"params/w": ArrayProof("float32", (2, 3), "0" * 16)}, digest_json({}), 2.5)


def test_a_proof_survives_json():
  assert Proof.parse(json.dumps(PROOF.to_json()).encode()) == PROOF
  bare = dataclasses.replace(PROOF, heldout_loss=None, arrays={})
  assert Proof.parse(json.dumps(bare.to_json()).encode()) == bare


@pytest.mark.parametrize("change", [
    lambda text: text.replace("2.5", "2.4"), lambda text: text.replace("params/w", "params/v"),
    lambda text: text[:-1], lambda text: "", lambda text: "[]", lambda text: "{}",
    lambda text: text.replace('"sha256"', '"sha257"'),
    lambda text: text.replace("[2, 3]", "[3, 2]"),
])
def test_a_damaged_proof_is_refused(change):
  text = json.dumps(PROOF.to_json())
  with pytest.raises(ValueError, match=r"."):
    Proof.parse(change(text).encode())


def test_a_newer_format_is_refused_by_name():
  values = {**PROOF.to_json(), "format": 2}
  values["sha256"] = digest_json({key: value for key, value in values.items() if key != "sha256"})
  with pytest.raises(ValueError, match="its format is 2: expected 1"):
    Proof.parse(json.dumps(values).encode())

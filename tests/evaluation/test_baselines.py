"""Bits per byte of n-grams and of xz."""

import lzma
import math

import numpy as np
import pytest

from dense_jax.evaluation import baselines


def _reference(train: bytes, heldout: bytes, order: int) -> float:
  """Computes the same model, one byte and one context at a time."""

  def probability(context: bytes, byte: int) -> float:
    shorter = probability(context[1:], byte) if context else 1 / 256
    ends = range(len(context), len(train))
    after = [train[end] for end in ends if train[end - len(context) : end] == context]
    kinds = len(set(after))
    return (after.count(byte) + kinds * shorter) / (len(after) + kinds) if after else shorter

  bits = 0.0
  for place, byte in enumerate(heldout):
    bits -= math.log2(probability(heldout[max(place - order + 1, 0) : place], byte))
  return bits / len(heldout)


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_ngram_is_the_plain_definition(order):
  train = b"the cat sat on the mat; the rat sat on the cat\n" * 2
  heldout = b"the bat sat \xff\x00 on that mat"
  value = baselines.byte_ngram_bits_per_byte(train, heldout, order)
  assert value == pytest.approx(_reference(train, heldout, order), rel=1e-12)


def test_ngram_probabilities_sum_to_one():
  train = b"abracadabra, abracadabra"
  for context in (b"ab", b"zz", b"ra"):
    total = 0.0
    for byte in range(256):
      with_byte = baselines.byte_ngram_bits_per_byte(train, context + bytes([byte]), 3) * 3
      without = baselines.byte_ngram_bits_per_byte(train, context, 3) * 2
      total += 2 ** (without - with_byte)
    assert total == pytest.approx(1)


def test_random_bytes_cost_eight_bits_and_known_text_little():
  random = np.random.default_rng(0).integers(0, 256, 200_000, dtype=np.uint8).tobytes()
  assert baselines.byte_ngram_bits_per_byte(random, random[::-1], 1) == pytest.approx(8, abs=0.01)
  text = b"0123456789" * 5000
  orders = [baselines.byte_ngram_bits_per_byte(text, text, order) for order in (1, 2, 3)]
  assert orders[0] == pytest.approx(math.log2(10), abs=0.01)
  assert max(orders[1:]) < 0.01


def test_texts_shorter_than_the_order():
  assert math.isfinite(baselines.byte_ngram_bits_per_byte(b"a", b"b", 3))


def test_xz():
  text = b"some text, " * 100
  assert baselines.xz_bits_per_byte(text) == 8 * len(lzma.compress(text, preset=9)) / len(text)


def test_bad_arguments_are_refused():
  with pytest.raises(ValueError, match="order = 0 is not valid: expected an integer from 1 to 8"):
    baselines.byte_ngram_bits_per_byte(b"a", b"a", 0)
  with pytest.raises(ValueError, match="must not be empty"):
    baselines.byte_ngram_bits_per_byte(b"a", b"", 2)
  with pytest.raises(ValueError, match="must not be empty"):
    baselines.xz_bits_per_byte(b"")

"""Baselines without a neural network: byte n-grams and xz, in bits per byte of held-out text.

Bits per byte do not depend on a tokenizer. A useful language model needs fewer than either.
"""

import lzma

import numpy as np


def _ngram_keys(text: bytes, order: int) -> np.ndarray:
  """Returns uint64 [bytes - order + 1]: each run of `order` bytes as one big-endian number."""
  codes = np.frombuffer(text, np.uint8).astype(np.uint64)
  count = max(len(codes) - order + 1, 0)
  keys = np.zeros(count, np.uint64)
  for offset in range(order):
    keys = (keys << np.uint64(8)) | codes[offset : offset + count]
  return keys


def _look_up(table: np.ndarray, values: np.ndarray, keys: np.ndarray) -> np.ndarray:
  """Returns the entry of `values` for each key's place in the sorted `table`; 0 if it is absent."""
  place = np.minimum(np.searchsorted(table, keys), len(table) - 1)
  return np.where(table[place] == keys, values[place], 0)


def byte_ngram_bits_per_byte(train: bytes, heldout: bytes, order: int) -> float:
  """Returns the bits per byte of a byte n-gram model with Witten-Bell smoothing.

    p(c | context) = (count(context, c) + kinds(context) p(c | shorter context))
                     / (count(context) + kinds(context))

  where kinds(context) is the number of different bytes that follow the context in `train`. The
  unigram is smoothed with equal probabilities of all 256 bytes, so every probability is above 0.

  Args:
    train: the text that the counts are taken from.
    heldout: the text that is scored; its first bytes have shorter contexts.
    order: bytes of an n-gram, 1 to 8: 2 is a bigram, 3 a trigram.

  Raises:
    ValueError: a text is empty, or `order` is out of range.
  """
  if not train or not heldout:
    raise ValueError("train and heldout must not be empty")
  if not 1 <= order <= 8:
    raise ValueError(f"order = {order} is not valid: expected an integer from 1 to 8")
  probabilities = np.full(len(heldout), 1 / 256)
  for length in range(1, min(order, len(train), len(heldout)) + 1):
    grams, gram_counts = np.unique(_ngram_keys(train, length), return_counts=True)
    contexts, first, kinds = np.unique(
        grams >> np.uint64(8), return_index=True, return_counts=True
    )
    context_counts = np.add.reduceat(gram_counts, first)
    keys = _ngram_keys(heldout, length)
    counts = _look_up(grams, gram_counts, keys)
    context_keys = keys >> np.uint64(8)
    totals = _look_up(contexts, context_counts, context_keys)
    fresh = _look_up(contexts, kinds, context_keys)
    shorter = probabilities[length - 1 :]
    mixed = (counts + fresh * shorter) / np.maximum(totals + fresh, 1)
    probabilities[length - 1 :] = np.where(totals > 0, mixed, shorter)
  return float(-np.log2(probabilities).mean())


def xz_bits_per_byte(heldout: bytes) -> float:
  """Returns the bits per byte of the text, compressed on its own by xz at preset 9.

  Raises:
    ValueError: the text is empty.
  """
  if not heldout:
    raise ValueError("heldout must not be empty")
  return 8 * len(lzma.compress(heldout, preset=9)) / len(heldout)

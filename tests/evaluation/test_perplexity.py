"""Held-out loss, perplexity and bits per byte: figures of any size, and values by hand."""

import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dense_jax.config import DataConfig, ExperimentConfig, TrainConfig
from dense_jax.data.batches import heldout_batches
from dense_jax.data.packing import TokenStore
from dense_jax.evaluation.evaluators import HeldOutLoss, Snapshot
from dense_jax.evaluation.perplexity import HeldOut, Scorer
from dense_jax.models.params import abstract_model, get_params, with_params
from tests.builders import model_config, random_model

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(("held_out", "bits", "line"), [
    (HeldOut(535.9, 100), 1.793,
     "held-out loss 5.3590 nats/token, perplexity 212.51, 1.793 bits/byte"),
    (HeldOut(535.9, 100, 256), 1.793,
     "held-out loss 5.3590 nats/token, perplexity 212.51, 1.793 bits/byte (context: fresh every "
     "256 tokens)"),
    (HeldOut(5084.25, 1), 7338.5,
     "held-out loss 5084.2500 nats/token, perplexity inf, 7338.500 bits/byte"),
    (HeldOut(500.0, 1), 1e30,
     "held-out loss 500.0000 nats/token, perplexity 1.404e+217, 1.000e+30 bits/byte"),
    (HeldOut(1e300, 1), INF, "held-out loss 1.000e+300 nats/token, perplexity inf, inf bits/byte"),
    (HeldOut(NAN, 1, 32), NAN, "held-out loss nan (context: fresh every 32 tokens)"),
    (HeldOut(INF, 1), INF, "held-out loss inf"), (HeldOut(-INF, 1), -INF, "held-out loss -inf"),
])
def test_one_line_of_figures(held_out, bits, line):
  assert held_out.describe(bits) == line


@pytest.mark.parametrize(("loss", "perplexity"), [
    (0.0, 1.0), (-1e9, 0.0), (709.0, math.exp(709)), (709.79, math.inf), (1e308, math.inf),
    (math.inf, math.inf), (-math.inf, 0.0),
])
def test_perplexity_of_any_loss(loss, perplexity):
  assert HeldOut(loss * 1.0, 1).perplexity == perplexity
  assert HeldOut(loss, 1).context == ""


def test_perplexity_of_what_is_not_a_number():
  held_out = HeldOut(math.nan, 3, window=1024)
  assert math.isnan(held_out.perplexity) and math.isnan(held_out.bits_per_byte(0.3))
  assert held_out.context == "fresh every 1,024 tokens"


# Three documents of 2, 3 and 1 bytes, as [bos] tokens [eos]: 12 tokens, of which 9 are targets.
BOS, EOS = 1, 2
DOCUMENTS = [[BOS, 5, 6, EOS], [BOS, 7, 8, 9, EOS], [BOS, 10, EOS]]
TARGETS, BYTES = 9, 6
# Contexts and targets, counted by hand. In windows of 3 tokens the second document goes on in a
# window of its own, and nothing before that is known there.
WHOLE = [([BOS, 5, 6], [5, 6, EOS]), ([BOS, 7, 8, 9], [7, 8, 9, EOS]), ([BOS, 10], [10, EOS])]
CUT = [([BOS, 5, 6], [5, 6, EOS]), ([BOS, 7], [7, 8]), ([8, 9], [9, EOS]), ([BOS, 10], [10, EOS])]


def snapshot(model, seq_len, batch_size):
  """Makes a run's snapshot of a model, with the three documents held out."""
  store = TokenStore(
      tokens=np.concatenate(DOCUMENTS).astype(np.uint16), starts=np.array([0, 4, 9]),
      document_bytes=np.array([2, 3, 1]), fingerprint="",
  )
  config = ExperimentConfig(
      model=model.config, data=DataConfig(seq_len=seq_len),
      train=TrainConfig(batch_size=batch_size, loss_chunk=2, eval_batches=0),
  )
  data = types.SimpleNamespace(heldout=store)
  return Snapshot(4, config, model, get_params(model), data, slice(None), jax.device_put)


def assert_scores(seen, nats, targets):
  """Checks loss, perplexity and bits per byte against a sum that was computed by hand."""
  numbers = HeldOutLoss().evaluate(seen)
  assert numbers == pytest.approx({
      "loss": nats / targets, "bits_per_byte": nats / targets * TARGETS / BYTES / math.log(2)
  }, rel=1e-5)
  data, train = seen.config.data, seen.config.train
  scorer = Scorer(seen.model, chunk=train.loss_chunk)
  batches = heldout_batches(seen.data.heldout, data.seq_len, train.batch_size)
  held_out = scorer(seen.params, batches, jax.device_put)
  assert (held_out.targets, held_out.window) == (targets, data.seq_len)
  assert held_out.nats == pytest.approx(nats, rel=1e-5)
  assert held_out.perplexity == pytest.approx(math.exp(nats / targets), rel=1e-5)


@pytest.mark.parametrize(("seq_len", "batch_size"), [
    (3, 1), (4, 3), (16, 1),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in ((3, 3), (4, 1), (16, 3))),
])
def test_a_model_that_knows_nothing(seq_len, batch_size):
  """Logits of zero are 11 equally likely tokens: by hand, ln 11 nats and perplexity 11."""
  model = abstract_model(model_config("mamba", 1))
  zeros = {name: jnp.zeros(leaf.shape, leaf.dtype) for name, leaf in get_params(model).items()}
  seen = snapshot(with_params(model, zeros), seq_len, batch_size)
  assert_scores(seen, TARGETS * math.log(11), TARGETS)
  numbers = HeldOutLoss().evaluate(seen)
  # 9 targets in 6 bytes: 1.5 log2(11).
  assert numbers["bits_per_byte"] == pytest.approx(5.189147, rel=1e-6)
  assert HeldOutLoss().describe(numbers, seen) == (
      f"held-out loss 2.3979 nats/token, perplexity 11.00, 5.189 bits/byte (context: fresh every "
      f"{seq_len} tokens)"
  )


@pytest.mark.parametrize(("seq_len", "parts"), [
    pytest.param(16, WHOLE, marks=pytest.mark.slow), (3, CUT),
])
@pytest.mark.parametrize("batch_size", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_by_hand_from_a_models_logits(seq_len, parts, batch_size):
  """Computes each context by itself, and the softmax in float64."""
  model = random_model(model_config("mamba", 1))
  nats = 0.0
  for context, targets in parts:
    logits_TV = np.asarray(model(jnp.asarray([context]))[0], np.float64)
    for logits_V, target in zip(logits_TV, targets, strict=True):
      nats += math.log(np.exp(logits_V).sum()) - logits_V[target]
  assert_scores(snapshot(model, seq_len, batch_size), nats, TARGETS)


def test_one_evaluator_serves_several_models():
  held_out_loss, numbers = HeldOutLoss(batches=1), []
  for seed in (0, 1, 0):
    model = random_model(model_config("mamba", 1), seed)
    numbers.append(held_out_loss.evaluate(snapshot(model, 16, 1)))
  assert numbers[0] == numbers[2] != numbers[1]

"""Held-out loss, perplexity and bits per byte: figures of any size, and values by hand."""

import math

import pytest

from dense_jax.evaluation.perplexity import HeldOut

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

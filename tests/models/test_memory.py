"""Training never holds the states of all tokens, by the compiled program's memory."""

import math
import re

import jax
import jax.numpy as jnp
import pytest

from dense_jax.models.params import abstract_model, get_params, with_params
from tests.builders import STATE_FAMILIES, TWINS, fast_jit, model_config, packed, random_batch

B, T, N = 2, 96, 48
MIXERS = {
    "mamba": {"state_size": N},
    "mamba2": {"state_size": N, "head_dim": 8, "groups": 1},
    "gau_retnet": {"heads": 2, "key_dim": 2 * N},
    "retnet": {"heads": 2, "key_dim": 2 * N},
    "s4d": {"state_size": N},
    "s4": {"state_size": N},
}
OPTIONS = {"lazy": {}, "mapped": {"transition": "mlp", "gate": "channel_state"}}


def _sizes(text):
  """Returns the numbers of elements of the arrays that an optimised program names."""
  shapes = re.findall(r"\b(?:f32|f64|bf16|f16)\[([\d,]+)\]", text)
  return [math.prod(int(size) for size in shape.split(",")) for shape in shapes]


CASES = [
    (family, documents, option)
    for option in OPTIONS for family in STATE_FAMILIES for documents in (True, False)
    if documents or family in ("s4d", "s4")  # Others have one form for both.
]
QUICK = [("gau_retnet", True, "lazy")]


def _marks(family, documents, option):
  if (family, documents, option) in QUICK:
    return ()
  rare = family in TWINS or option == "mapped"
  return pytest.mark.exhaustive if rare else pytest.mark.slow


@pytest.mark.parametrize(
    ("family", "documents", "option"),
    [pytest.param(*case, marks=_marks(*case)) for case in CASES],
)
def test_training_never_holds_the_states_of_all_tokens(family, documents, option):
  config = model_config(
      family, 2, layers=3, remat="full", chunk=16, **MIXERS[family], **OPTIONS[option]
  )
  abstract = abstract_model(config)
  channels = abstract.stack.prefix_layers[0].mixer.width
  batch = random_batch(packed([[40, 56], [T]]))

  def loss(params):
    segments = batch.segments if documents else None
    hidden, _ = with_params(abstract, params).hidden(batch.tokens_BT, segments)
    return jnp.sum(jnp.square(hidden))

  compiled = fast_jit(jax.grad(loss)).lower(get_params(abstract)).compile()
  # The largest array is a small part of the states of all tokens of one layer.
  assert max(_sizes(compiled.as_text())) < B * T * channels * N / 3

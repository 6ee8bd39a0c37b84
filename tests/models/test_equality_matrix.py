"""Every family computes one function, in every mode and with every dense option.

The reference is the recurrence itself: a float32 `lax.scan` over tokens, which also reads the
shallow layers' states token by token. Every other form of the family is compared with it and, if
rows hold one document each, so is decoding step by step; attention, whose cache can be emptied, is
always compared with steps. The comparison covers logits, the final state, and the gradients by all
parameters and by the initial state.

Plain dense connections of depth 2 (and attention) are tested at every length with documents, and at
some lengths without; the base model, whose read is one of theirs, at fewer. Each other option is
tested with one document, and with documents at a length that changes from family to family.
Families whose tokens choose their decays are also tested with decays that nearly clear the state.
`make test` runs a part, `make test-slow` another, `make test-exhaustive` the rest.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dense_jax.models.language_model import ModelState
from dense_jax.models.params import abstract_model, with_params
from dense_jax.models.registry import FAMILIES as REGISTRY
from dense_jax.ops.resolver import IMPLEMENTATIONS
from tests.builders import (
    FAMILIES,
    INPUT_FAMILIES,
    QUICK_FAMILIES,
    STATE_FAMILIES,
    TWINS,
    VOCAB,
    fast_jit,
    model_config,
    normal,
    packed,
    random_params,
    random_state,
    random_tokens,
    tree_dot,
    where_cache,
)
from tests.helpers import assert_trees_close, scale_of

B, C = 2, 4  # C: the chunk.
LENGTHS = (1, 2, C - 1, C, C + 1, 63, 257)
STATE = {"depth": 2, "inject": "state"}
INPUTS = {"depth": 2, "inject": "inputs"}
OPTIONS = {
    "base": {"depth": 0},
    "m1": STATE | {"depth": 1},
    "m2": STATE,
    "start-stride": STATE | {"layers": 4, "start": 2, "stride": 2},
    "first": STATE | {"layers": 4, "reads": "first"},
    "spread": STATE | {"depth": 3, "layers": 6, "reads": "spread"},
    "linear": STATE | {"transition": "linear", "gate_sharing": "per_source"},
    "mlp": STATE | {"transition": "mlp", "transition_rank": 2},
    "ungated": STATE | {"gate": "none"},
    "state-gate": STATE | {"gate": "channel_state"},
    "concat": STATE | {"fusion": "concat"},
    "gated": STATE | {"fusion": "gated"},
    "attention": STATE | {"fusion": "attention"},
    "fused": STATE | {"depth": 1, "layers": 4, "source": "fused", "gate": "channel_state"},
    "inputs": INPUTS | {"gate_sharing": "per_source"},
    "inputs-first": INPUTS | {"layers": 4, "reads": "first"},
    "inputs-fused": INPUTS | {"source": "fused", "input_norm": False},
}
# Interpreted kernels take long to compile. tests/ops compares them at every length, with segments;
# here they meet models: one pass for all reads, reads apart, decays that rows share.
KERNEL_LENGTHS = {
    "mamba": (63,), "mamba2": (257,), "gau_retnet": (C - 1,), "transformer": (63,),
}
KERNEL_READS = ("linear", "state-gate", "concat", "attention", "fused")
TPU_READS = ("linear", "concat", "attention")  # The GPU's kernels are not given all of them.
GPU_INPUTS = ("inputs", "inputs-fused")  # Only the GPU has kernels of input injection.
# Of the options of dense connections, those that `make test` has, and `make test-slow` besides.
QUICK_OPTIONS = ("attention", "inputs-fused")
SLOW_OPTIONS = ("linear", "inputs")
# (documents and padding, a carried state): without both, an LTI family convolves.
SCENES = {
    "documents": (True, True), "one-document": (False, False), "carried": (False, True),
    "strong-decays": (True, True),
}
SELECTIVE_FAMILIES = ("mamba", "mamba2")  # Their tokens choose their decays.


def _kernels_take_part(family, option, length, scene):
  plain = "m2" if family in STATE_FAMILIES else "base"
  lengths = KERNEL_LENGTHS.get(family, ()) if option == plain else ()
  reads = (*KERNEL_READS, *GPU_INPUTS) if family == "mamba2" else ()
  if scene == "strong-decays":
    return family == "mamba2" and length == 63
  return scene == "documents" and (length in lengths or option in reads)


def _marks(family, option, length, scene, number):
  """Marks a case for `make test` (none), for `.ci/run` (slow) or for `make test-exhaustive`."""
  plain = option == ("m2" if family in STATE_FAMILIES else "base")
  if scene == "strong-decays":
    return pytest.mark.exhaustive
  if plain and length == C + 1 and scene == "documents":
    return () if family in QUICK_FAMILIES else (
        pytest.mark.exhaustive if family in TWINS else pytest.mark.slow)
  turn = family == QUICK_FAMILIES[number % len(QUICK_FAMILIES)]
  if turn and option in (*QUICK_OPTIONS, *SLOW_OPTIONS) and scene == "documents":  # One family.
    return () if option in QUICK_OPTIONS else pytest.mark.slow
  # Kernels of input injection; s4d's form for one document.
  some = (("mamba2", "inputs", "documents", length), ("s4d", "m2", "one-document", 63))
  here = (family, option, scene, length)
  return pytest.mark.slow if here in some else pytest.mark.exhaustive


def _cases():
  """Returns (family, option, length, scene) of all cases, marked."""
  cases = []
  for family in FAMILIES:
    options = [
        name for name, option in OPTIONS.items()
        if not option["depth"] or (family in STATE_FAMILIES
        and (option["inject"] == "state" or family in INPUT_FAMILIES))
    ]
    for number, option in enumerate(options):
      turn = (number + FAMILIES.index(family)) % len(LENGTHS)
      lengths = {"documents": LENGTHS[turn : turn + 1], "one-document": (C + 1,), "carried": ()}
      if option == "base" and family in STATE_FAMILIES:
        lengths = {"documents": (C + 1, 257), "one-document": (63,), "carried": (1,)}
      elif option in ("base", "m2"):
        lengths = {"documents": LENGTHS, "one-document": (1, C + 1, 63), "carried": (1, C + 1, 63)}
        if family in INPUT_FAMILIES:  # The same form as documents.
          lengths |= {"one-document": (63,), "carried": (C + 1,)}
        if option == "m2" and family in SELECTIVE_FAMILIES:
          lengths["strong-decays"] = (63, 257) if family == "mamba2" else (63,)
      elif family == "s4":  # Its reads are s4d's, at twice the time.
        lengths = lengths | {"one-document" if number % 2 else "documents": ()}
      for scene, length in [(name, length) for name in SCENES for length in lengths.get(name, ())]:
        marks = _marks(family, option, length, scene, number)
        name = f"{family}-{option}-{length}-{scene}"
        cases.append(pytest.param(family, option, length, scene, marks=marks, id=name))
  return cases


def _forms(family, option, length, scene):
  """Returns the family's forms that differ in that scene, the reference last."""
  # cuDNN is on GPUs alone; tests/ops/attention tests what is asked of it.
  forms = [form for form in IMPLEMENTATIONS[REGISTRY[family].form] if form != "cudnn"]
  part = _kernels_take_part(family, option, length, scene)
  kernels = {
      "pallas": part and option not in GPU_INPUTS, "triton": part and option not in TPU_READS,
  }
  forms = [form for form in forms if kernels.get(form, True)]
  forms.sort(key=lambda form: form in ("recurrent", "softmax"))
  if "conv" in forms:  # It takes chunks where rows hold documents or go on from a state.
    return ("conv", "recurrent") if scene == "one-document" else ("chunked", "recurrent")
  assert forms[-1] in ("recurrent", "softmax")
  return forms


def _with_strong_decays(params):
  """Gives a selective family step sizes that reach 60 in some tokens and are near 0 in others.

  B and C keep their size. With states of 1e5, whose reads cancel and are then normalised, the
  recurrence itself would be wrong by more than the tolerance (by 6e-5; float64 tells).
  """
  changed = {}
  for name, value in params.items():
    if name.endswith("dt_bias"):
      value = jnp.full_like(value, -17.0)
    elif name.endswith(".dt_proj.kernel"):
      value = 20 * value
    elif name.endswith(".bcdt_proj.kernel"):
      heads = len(params[name.replace("bcdt_proj.kernel", "dt_bias")])
      value = value.at[:, -heads:].multiply(20)
    elif name.endswith("a_log"):
      value = value + 1
    changed[name] = value
  return changed


def _segments(length):
  """Makes documents that begin within chunks and at their borders; the second row is padded."""
  first = min(length, 6)
  rows = [[first, length - first], [length - length // 3]]
  return packed([[n for n in row if n] for row in rows], time=length, first=[3, 0])


def _positions_after(state, segments, length):
  """Returns the position of each row's next token."""
  if segments is None:
    return [int(position) + length for position in state.position_B]
  last_B = np.sum(segments.valid_BT, axis=1) - 1
  return [int(row[last]) + 1 for row, last in zip(segments.positions_BT, last_B, strict=True)]


def _logits_by_steps(model, tokens, segments, state):
  """Decodes token by token; with segments, the layers' states must be attention caches."""
  fresh = model.init_state(B)

  def choose(mask_B, chosen, other):
    return ModelState(
        jnp.where(mask_B, chosen.position_B, other.position_B),
        where_cache(mask_B[:, None], chosen.layers, other.layers),
    )

  def step(before, column):
    token_B, reset_B, valid_B = column
    if segments is not None:
      before = choose(reset_B, fresh, before)
    after, logits = model.step(before, token_B)
    return (after if segments is None else choose(valid_B, after, before)), logits

  marks = (None, None) if segments is None else (segments.resets_BT.T, segments.valid_BT.T)
  state, logits = jax.lax.scan(step, state or fresh, (tokens.T, *marks))
  return jnp.swapaxes(logits, 0, 1), state


def _logits(model, tokens, segments, state):
  hidden, after = model.hidden(tokens, segments, state)
  return model.logits(hidden), after


@pytest.mark.parametrize(("family", "option", "length", "scene"), _cases())
def test_every_form_is_the_recurrence(family, option, length, scene):
  has_documents, has_state = SCENES[scene]
  # A document's first read, one product q k, may be near zero, and a small epsilon of the norm
  # of retention's heads multiplies its rounding: at 0.01, weights that differ by 1e-7 moved
  # gradients of size 40 by 0.01 (retnet-fused-3-documents); at 1, by less than 1e-5.
  # Only long chunks have sums of strong decays that are large.
  chunk = 64 if scene == "strong-decays" else C
  shape = {"layers": 3, "width": 8, "chunk": chunk, "norm_eps": 1.0}
  config = model_config(family, **shape | OPTIONS[option])
  models = [
      abstract_model(dataclasses.replace(config, implementation=form))
      for form in _forms(family, option, length, scene)
  ]
  params, tokens = random_params(config), random_tokens(1, B, length)
  if scene == "strong-decays":
    params = _with_strong_decays(params)
  segments = _segments(length) if has_documents else None
  valid = 1.0 if segments is None else segments.valid_BT[..., None]
  state = random_state(models[0], [3, 0] if has_documents else [3, 5])
  weights = normal(2, B, length, VOCAB) * valid / length**0.5
  after = random_state(models[0], _positions_after(state, segments, length), seed=3)
  cotangent = jax.tree.map(lambda leaf: 0.1 * leaf, after.layers)

  def everything(model, run):
    def objective(params, layers):
      before = ModelState(state.position_B, layers) if has_state else None
      logits, after = run(with_params(model, params), before)
      value = jnp.sum(weights * logits) + tree_dot(cotangent, after.layers)
      return value, (logits * valid, after)

    gradients, outputs = jax.grad(objective, argnums=(0, 1), has_aux=True)(params, state.layers)
    return outputs, gradients

  @fast_jit
  def compare():
    def outcome(model, logits):
      run = functools.partial(logits, tokens=tokens, segments=segments)
      return everything(model, lambda bound, before: run(bound, state=before))

    results = [outcome(model, _logits) for model in models]
    if not has_documents or REGISTRY[family].form == "attention":
      results.insert(0, outcome(models[-1], _logits_by_steps))
    return results

  *others, expected = compare()
  assert others
  for actual in others:
    assert_trees_close(actual[0], expected[0])
    assert_trees_close(actual[1], expected[1], scale=scale_of(expected[1]))

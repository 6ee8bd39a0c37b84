"""Step sizes and decays at the ends of their ranges: all stays finite, over 16k tokens too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dense_jax.models.params import abstract_model, with_params
from tests.builders import (
    STATE_FAMILIES,
    fast_jit,
    model_config,
    random_model,
    random_params,
    random_tokens,
)
from tests.helpers import assert_trees_close

T = 16384
# Of a parameter's every number: dt from 2e-9 to 20, |A| from 5e-5 to 400; S4 likewise.
ENDS = {
    "dt_bias": (-20.0, 20.0), "a_log": (-10.0, 6.0),
    "log_dt": (-9.0, 2.3), "log_a": (-10.0, 3.0),
}


@pytest.mark.parametrize(("family", "dtype"), [
    pytest.param(
        family, dtype,
        marks=pytest.mark.slow if dtype == "bfloat16" and family in ("gau_retnet", "s4d")
        else pytest.mark.exhaustive,
    )
    for family in STATE_FAMILIES for dtype in ("float32", "bfloat16")
])
def test_extreme_steps_and_decays_stay_finite(family, dtype):
  # Retention's decays are constants: more heads come nearer to 1.
  options = {"heads": 8, "key_dim": 16} if "retnet" in family else {}
  config = model_config(
      family, 1, "state", layers=2, width=16, chunk=0, dtype=dtype, remat="full", **options
  )
  abstract, tokens = abstract_model(config), random_tokens(0, 1, T)

  @fast_jit
  def run(params):
    def objective(params):
      hidden, after = with_params(abstract, params).hidden(tokens)
      return jnp.mean(jnp.square(hidden.astype(jnp.float32))), (hidden, after)

    return jax.value_and_grad(objective, has_aux=True)(params)

  params = random_params(config)
  for steps in (0, 1):
    for decays in (0, 1):
      changed = {}
      for name, value in params.items():
        last = name.rpartition(".")[2]
        which = steps if last in ("dt_bias", "log_dt") else decays
        changed[name] = jnp.full_like(value, ENDS[last][which]) if last in ENDS else value
      for path, leaf in jax.tree_util.tree_leaves_with_path(run(changed)):
        assert np.isfinite(np.asarray(leaf, np.float32)).all(), (steps, decays, path)


@pytest.mark.parametrize("family", ["retnet", "gau_retnet"])
def test_heads_that_forget_nothing_stay_finite(family):
  """1 - gamma of the last of 128 heads would be 2^-132, which is no normal float32."""
  config = model_config(family, layers=1, width=128, heads=128, key_dim=256, expand=8)
  model, tokens = random_model(config), random_tokens(0, 1, 5)
  logits_BTV = fast_jit(lambda tokens: model(tokens))(tokens)
  assert np.isfinite(logits_BTV).all()
  state, _ = fast_jit(lambda tokens: model.prefill(tokens))(tokens[:, :-1])
  _, last_BV = fast_jit(lambda state, tokens: model.step(state, tokens))(state, tokens[:, -1])
  assert_trees_close(last_BV, logits_BTV[:, -1])

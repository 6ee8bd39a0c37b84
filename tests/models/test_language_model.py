"""What a model refuses: tokens of no shape for it, sizes that its heads do not divide."""

import jax
import jax.numpy as jnp
import pytest

from dense_jax.errors import InputError
from dense_jax.models.params import abstract_model
from tests.builders import model_config


@pytest.mark.parametrize("family", ["mamba", "retnet", "s4d", "transformer"])
@pytest.mark.parametrize("shape", [(1, 0), (0, 3), (3,)])
def test_rows_without_tokens_are_named(family, shape):
  model = abstract_model(model_config(family))
  with pytest.raises(InputError, match=r"the tokens' shape = \(.*\) is not valid: expected \[B, T"):
    model(jnp.zeros(shape, jnp.int32))


def test_a_step_without_rows_is_named():
  model = abstract_model(model_config("mamba"))
  state = jax.eval_shape(lambda: model.init_state(0))
  with pytest.raises(InputError, match=r"the tokens' shape = \(0,\) is not valid: expected \[B\]"):
    model.step(state, jnp.zeros(0, jnp.int32))


@pytest.mark.parametrize(("family", "options", "message"), [
    ("gau_retnet", {"width": 100, "heads": 3},
     "mixer.heads = 3 is not valid: expected an integer whose double divides K = 50, as key_dim = "
     "0 and width = 100 make it"),
    ("gau_retnet", {"width": 1, "heads": 1}, "K = 0, as key_dim = 0 and width = 1"),
    ("retnet", {"heads": 3, "key_dim": 9}, "K = 9, as key_dim = 9 and width = 16"),
    ("retnet", {"heads": 3, "key_dim": 12},
     "mixer.heads = 3 is not valid: expected a divisor of E = expand * width = 2 * 16"),
])
def test_heads_that_do_not_fit_are_named_with_what_they_have_to_divide(family, options, message):
  with pytest.raises(InputError) as error:
    abstract_model(model_config(family, **options))
  assert message in str(error.value)

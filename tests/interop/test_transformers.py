"""transformers computes the same from the files of save_hf; skipped if it is not installed."""

import jax
import numpy as np
import pytest

from dense_jax.interop import load_hf, save_hf
from dense_jax.models.params import get_params
from tests.builders import model_config, random_model, random_tokens

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

MODELS = [
    ("MambaForCausalLM", "mamba", {"tie_embeddings": True}),
    ("MambaForCausalLM", "mamba", {"dt_rank": 0, "norm_eps": 0.01}),
    ("Mamba2ForCausalLM", "mamba2", {}),
    ("Mamba2ForCausalLM", "mamba2", {"groups": 1, "tie_embeddings": True, "norm_eps": 0.01}),
    ("Mamba2ForCausalLM", "mamba2", {"dt_limit_min": 0.1, "dt_limit_max": 0.4}),
    # transformers' LLaMA has no window: up to the context's length both compute the same.
    ("LlamaForCausalLM", "transformer", {"kv_heads": 2, "context": 40}),
    ("LlamaForCausalLM", "transformer", {"tie_embeddings": True, "head_dim": 6, "norm_eps": 0.01,
                                         "context": 40, "rope_theta": 50.0}),
]


@pytest.mark.parametrize(("name", "family", "options"), MODELS)
def test_transformers_computes_our_logits_from_what_we_save(tmp_path, name, family, options):
  model = random_model(model_config(family, layers=3, **options))
  tokens = random_tokens(0, 2, 40)
  save_hf(model, str(tmp_path), bos_token_id=1, eos_token_id=2)
  theirs, loading = transformers.AutoModelForCausalLM.from_pretrained(
      tmp_path, output_loading_info=True)
  assert type(theirs).__name__ == name
  assert not any(loading.values()), loading  # Missing, unexpected or mismatched tensors.
  with torch.no_grad():
    expected = theirs.eval()(torch.tensor(np.asarray(tokens, np.int64)), use_cache=False).logits
  logits = jax.jit(lambda model, tokens: model(tokens))(model, tokens)
  difference = np.abs(np.asarray(logits) - expected.numpy())
  assert difference.max() < 1e-3, difference.max()
  assert np.mean(difference < 1e-4) > 0.9


@pytest.mark.parametrize(("name", "family", "options"), MODELS[::2])
def test_we_load_what_transformers_saves(tmp_path, name, family, options):
  model = random_model(model_config(family, layers=3, **options))
  save_hf(model, str(tmp_path / "ours"))
  theirs = getattr(transformers, name).from_pretrained(tmp_path / "ours")
  theirs.save_pretrained(tmp_path / "theirs")
  ours, again = (get_params(load_hf(str(tmp_path / n))) for n in ("ours", "theirs"))
  assert ours.keys() == again.keys()
  for key, value in ours.items():
    np.testing.assert_array_equal(value, again[key], err_msg=key)

"""Golden numbers of transformers' Mamba and Mamba-2: logits, loss, greedy continuations."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dense_jax.interop import load_hf, save_hf
from dense_jax.models.params import get_params
from dense_jax.ops.cross_entropy import token_cross_entropy
from tests.builders import with_options

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
PROMPT = 20  # The first tokens of `greedy` are the prompt.
FORMS = {
    "mamba": [
        {"implementation": "recurrent"}, {"implementation": "associative", "chunk": 7},
    ],
    "mamba2": [
        {"implementation": "recurrent"}, {"implementation": "associative", "chunk": 7},
        {"implementation": "chunked", "chunk": 7}, {"implementation": "chunked", "chunk": 64},
    ],
}


@pytest.fixture(scope="module", params=["mamba", "mamba2"])
def golden(request, tmp_path_factory):
  file = np.load(GOLDEN / f"{request.param}_hf.npz")
  folder = tmp_path_factory.mktemp(request.param)
  tensors = {k.removeprefix("param/"): file[k] for k in file.files if k.startswith("param/")}
  # The file has only keys that differ from transformers' defaults, which the reader shares.
  config = {"model_type": request.param} | json.loads(str(file["config"]))
  save_file(tensors, folder / "model.safetensors")
  (folder / "config.json").write_text(json.dumps(config))
  return {**file, "kind": request.param, "folder": folder, "tensors": tensors, "config": config}


def test_logits_and_loss_in_every_form(golden):
  model = load_hf(str(golden["folder"]))
  tokens = golden["input_ids"]
  for options in FORMS[golden["kind"]]:
    run = jax.jit(lambda model, tokens: model(tokens))
    logits = run(with_options(model, **options), tokens)
    difference = np.abs(np.asarray(logits) - golden["logits"])
    assert difference.max() < 1e-3, (options, difference.max())
    assert np.mean(difference < 1e-4) > 0.9, options
    loss = jnp.mean(token_cross_entropy(logits[:, :-1], tokens[:, 1:])[0])
    np.testing.assert_allclose(loss, golden["loss"], rtol=1e-5)


@pytest.mark.slow
def test_greedy_tokens_by_the_parallel_form(golden):
  tokens = golden["greedy"]
  logits = load_hf(str(golden["folder"]))(tokens[:, :-1])
  np.testing.assert_array_equal(np.argmax(logits, -1)[:, PROMPT - 1 :], tokens[:, PROMPT:])


def test_greedy_tokens_by_prefill_and_steps(golden):
  model, expected = load_hf(str(golden["folder"])), golden["greedy"]
  state, logits = jax.jit(lambda model, tokens: model.prefill(tokens))(model, expected[:, :PROMPT])
  step = jax.jit(lambda model, state, tokens: model.step(state, tokens))
  chosen = [jnp.argmax(logits, -1)]
  while len(chosen) < expected.shape[1] - PROMPT:
    state, logits = step(model, state, chosen[-1])
    chosen.append(jnp.argmax(logits, -1))
  np.testing.assert_array_equal(np.stack(chosen, 1), expected[:, PROMPT:])


def test_the_embeddings_other_name(golden, tmp_path):
  tensors = dict(golden["tensors"])
  tensors["backbone.embedding.weight"] = tensors.pop("backbone.embeddings.weight")
  save_file(tensors, tmp_path / "model.safetensors")
  (tmp_path / "config.json").write_text(json.dumps(golden["config"]))
  expected = get_params(load_hf(str(golden["folder"])))
  for name, value in get_params(load_hf(str(tmp_path))).items():
    np.testing.assert_array_equal(value, expected[name], err_msg=name)


def test_what_is_saved_are_their_tensors(golden, tmp_path):
  save_hf(load_hf(str(golden["folder"])), str(tmp_path))
  saved = load_file(tmp_path / "model.safetensors")
  assert saved.keys() == golden["tensors"].keys() - {"lm_head.weight"}  # A tied head is not saved.
  for name, value in saved.items():
    np.testing.assert_array_equal(value, golden["tensors"][name], err_msg=name)
  config = json.loads((tmp_path / "config.json").read_text())
  known = golden["config"].items() - {("chunk_size", 16), ("pad_token_id", 0)}
  for key, value in known - {("bos_token_id", 1), ("eos_token_id", 2)}:
    assert config[key] == value, key

"""Golden numbers of the authors' DenseRetNet: logits in every mode, loss and gradients."""

import dataclasses
import json
import pathlib
import pickle
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dense_jax.errors import InputError
from dense_jax.interop import load_hf, save_hf
from dense_jax.models.params import abstract_model, by_layer, get_params, with_params
from dense_jax.ops.cross_entropy import token_cross_entropy

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
# Their parameter -> ours, for the gradients that the files hold.
GRADIENTS = {
    "model.layers.1.self_attn.k_select.fc1.weight":
        "layers.1.mixer.dense.gates.k.0.down.kernel",
    "model.layers.1.self_attn.v_select.fc2.weight": "layers.1.mixer.dense.gates.v.0.up.kernel",
    "model.layers.0.self_attn.k_proj.weight": "layers.0.mixer.k_proj.kernel",
    "model.embed_tokens.weight": "embedding",
}


@pytest.fixture(scope="module", params=["m1", "m2"])
def golden(request, tmp_path_factory):
  file = np.load(GOLDEN / f"dense_gau_retnet_{request.param}.npz")
  folder = tmp_path_factory.mktemp(request.param)
  tensors = {k.removeprefix("param/"): file[k] for k in file.files if k.startswith("param/")}
  save_file(tensors, folder / "model.safetensors")
  (folder / "config.json").write_text(str(file["config"]))
  return {**file, "folder": folder, "tensors": tensors}


def _form(model, form):
  """Returns the model with another form of the recurrence."""
  options = {
      "parallel": {"implementation": "chunked", "chunk": 64},  # One chunk: all in parallel.
      "chunked": {"implementation": "chunked", "chunk": 7},
      "associative": {"implementation": "associative", "chunk": 8},
      "recurrent": {"implementation": "recurrent"},
  }[form]
  config = dataclasses.replace(model.config, **options)
  return with_params(abstract_model(config), get_params(model))


def _assert_close(logits, expected):
  difference = np.abs(np.asarray(logits) - expected)
  assert difference.max() < 1e-3, difference.max()
  assert np.mean(difference < 1e-4) > 0.9


@pytest.mark.parametrize("form", [
    "chunked", "recurrent",
    *(pytest.param(form, marks=pytest.mark.slow) for form in ("parallel", "associative")),
])
def test_logits(golden, form):
  model = _form(load_hf(str(golden["folder"])), form)
  logits = jax.jit(lambda model, tokens: model(tokens))(model, golden["input_ids"])
  _assert_close(logits, golden["logits"])


def test_step_by_step(golden):
  model = load_hf(str(golden["folder"]))
  step = jax.jit(lambda model, state, tokens: model.step(state, tokens))
  tokens = golden["input_ids"]
  state, logits = model.init_state(tokens.shape[0]), []
  for t in range(tokens.shape[1]):
    state, logits_t = step(model, state, tokens[:, t])
    logits.append(logits_t)
  _assert_close(np.stack(logits, 1), golden["logits_recurrent"])
  _assert_close(np.stack(logits, 1), golden["logits"])


@pytest.mark.parametrize("form", [
    "chunked", *(pytest.param(form, marks=pytest.mark.slow) for form in ("parallel", "recurrent"))
])
def test_loss_and_gradients(golden, form):
  model = _form(load_hf(str(golden["folder"])), form)
  tokens = golden["input_ids"]

  def loss(params):
    logits = with_params(model, params)(tokens[:, :-1])
    return jnp.mean(token_cross_entropy(logits, tokens[:, 1:])[0])

  value, gradients = jax.jit(jax.value_and_grad(loss))(get_params(model))
  np.testing.assert_allclose(value, golden["loss"], rtol=1e-5)
  gradients = by_layer(model.config, gradients)
  for theirs, ours in GRADIENTS.items():
    expected = golden[f"grad/{theirs}"]
    actual = gradients[ours] if ours == "embedding" else gradients[ours].T
    scale = np.abs(expected).max()
    np.testing.assert_allclose(actual / scale, expected / scale, atol=1e-3, err_msg=theirs)


def test_shards_with_an_index(golden, tmp_path):
  names = sorted(golden["tensors"])
  shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
  for shard, keys in shards.items():
    save_file({key: golden["tensors"][key] for key in keys}, tmp_path / shard)
  index = {"weight_map": {key: shard for shard, keys in shards.items() for key in keys}}
  (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
  (tmp_path / "config.json").write_text(str(golden["config"]))
  whole, sharded = load_hf(str(golden["folder"])), load_hf(str(tmp_path))
  for name, value in get_params(whole).items():
    np.testing.assert_array_equal(value, get_params(sharded)[name], err_msg=name)


def test_what_is_saved_are_their_tensors(golden, tmp_path):
  save_hf(load_hf(str(golden["folder"])), str(tmp_path))
  saved = load_file(tmp_path / "model.safetensors")
  left_out = golden["tensors"].keys() - saved.keys()
  assert all(".layers.0.self_attn." in name for name in left_out)  # Layer 0 does not use them.
  assert len(left_out) == 6
  for name, value in saved.items():
    np.testing.assert_array_equal(value, golden["tensors"][name], err_msg=name)
  config, theirs = json.loads((tmp_path / "config.json").read_text()), json.loads(
      str(golden["config"]))
  tokens = {"pad_token_id", "bos_token_id", "eos_token_id"}
  for key in theirs.keys() - tokens - {"max_position_embeddings"}:
    assert config[key] == theirs[key], key


def test_bad_tensors_are_all_listed(golden, tmp_path):
  tensors = dict(golden["tensors"])
  del tensors["model.layers.1.self_attn.q_proj.weight"]
  tensors["model.layers.9.extra"] = np.zeros(3, np.float32)
  tensors["model.norm.weight"] = np.zeros(5, np.float32)
  save_file(tensors, tmp_path / "model.safetensors")
  (tmp_path / "config.json").write_text(str(golden["config"]))
  with pytest.raises(ValueError) as error:
    load_hf(str(tmp_path))
  text = str(error.value)
  assert "missing: model.layers.1.self_attn.q_proj.weight" in text
  assert "extra: model.layers.9.extra" in text
  assert "shape: model.norm.weight is (5,), expected (64,)" in text


class _TorchTensor:
  """The part of a PyTorch tensor's interface that reading weights needs."""

  def __init__(self, value):
    self._value = value

  def float(self):
    return self

  def numpy(self):
    return self._value


def _fake_torch(monkeypatch, load):
  module = types.ModuleType("torch")
  module.load = load
  monkeypatch.setitem(sys.modules, "torch", module)


def test_pytorch_file_is_read_with_weights_only(golden, tmp_path, monkeypatch):
  def load(file, *, map_location, weights_only):
    assert (file.name, map_location, weights_only) == ("pytorch_model.bin", "cpu", True)
    return {name: _TorchTensor(value) for name, value in golden["tensors"].items()}

  _fake_torch(monkeypatch, load)
  (tmp_path / "pytorch_model.bin").touch()
  (tmp_path / "config.json").write_text(str(golden["config"]))
  expected = get_params(load_hf(str(golden["folder"])))
  for name, value in get_params(load_hf(str(tmp_path))).items():
    np.testing.assert_array_equal(value, expected[name], err_msg=name)


def test_pytorch_file_that_is_refused_or_cannot_be_read(golden, tmp_path, monkeypatch):
  def load(file, **options):
    raise pickle.UnpicklingError("Weights only load failed")

  (tmp_path / "pytorch_model.bin").touch()
  (tmp_path / "config.json").write_text(str(golden["config"]))
  _fake_torch(monkeypatch, load)
  with pytest.raises(InputError, match="is not a file of PyTorch weights alone"):
    load_hf(str(tmp_path))
  monkeypatch.setitem(sys.modules, "torch", None)  # Makes `import torch` fail.
  with pytest.raises(InputError, match="needs PyTorch to be read"):
    load_hf(str(tmp_path))


def test_missing_files_are_named(tmp_path):
  with pytest.raises(ValueError, match=r"config\.json does not exist"):
    load_hf(str(tmp_path))
  (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
  with pytest.raises(ValueError, match="'bert' is not of a known layout"):
    load_hf(str(tmp_path))

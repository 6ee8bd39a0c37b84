"""save_hf and load_hf: every model is restored bitwise, from the first layout that fits it."""

import dataclasses
import json
import math
import os

import numpy as np
import pytest
from safetensors.numpy import load_file

from dense_jax.config import defaults
from dense_jax.errors import InputError
from dense_jax.interop import load_hf, save_hf
from dense_jax.interop.kinds import KINDS, choose
from dense_jax.models.params import get_params, unrolled
from dense_jax.models.registry import FAMILIES
from tests.builders import fast_jit, model_config, random_model, random_tokens

RELEASED = {"depth": 1, "inject": "inputs", "gate_reduction": 32, "layers": 4, "width": 32,
            "key_dim": 16}
# (layout, family, options): five layers make scanned super-blocks unless it is said otherwise.
MODELS = [
    ("mamba", "mamba", {}),
    ("mamba", "mamba", {"tie_embeddings": True, "dt_rank": 0}),
    ("mamba2", "mamba2", {}),
    ("mamba2", "mamba2", {"dt_limit_min": 0.01, "dt_limit_max": 0.5, "tie_embeddings": True}),
    ("mamba2", "mamba2", {"dt_limit_min": 0.01, "conv_width": 3}),
    ("llama", "transformer", {"kv_heads": 2}),
    ("llama", "transformer", {"tie_embeddings": True, "head_dim": 6, "rope_theta": 500.0}),
    ("DenseRetNet", "gau_retnet", RELEASED),
    ("DenseRetNet", "gau_retnet", RELEASED | {"depth": 2, "key_dim": 0, "gate_reduction": 20}),
    # Models that the layouts above cannot represent.
    ("dense_jax", "mamba", {"depth": 1}),
    ("dense_jax", "mamba", {"depth": 2, "transition": "linear", "fusion": "attention"}),
    ("dense_jax", "mamba2", {"depth": 1, "inject": "inputs", "dtype": "bfloat16"}),
    ("dense_jax", "transformer", {"width": 18, "head_dim": 4}),
    ("dense_jax", "gau_retnet", {}),
    ("dense_jax", "gau_retnet", RELEASED | {"gate_reduction": 4}),
    # The released gates have widths that follow from D alone: here they would be others.
    ("dense_jax", "gau_retnet", RELEASED | {"key_dim": 8}),
    ("dense_jax", "gau_retnet", RELEASED | {"expand": 3}),
    ("dense_jax", "gau_retnet", RELEASED | {"width": 16, "key_dim": 8}),
    ("dense_jax", "gau_retnet", RELEASED | {"input_norm": False}),
    ("dense_jax", "gau_retnet", RELEASED | {"stride": 2}),
    ("dense_jax", "gau_retnet", RELEASED | {"inject": "state"}),
    ("dense_jax", "s4", {}),
    ("dense_jax", "s4d", {"depth": 1}),
]


def _files(folder):
  tensors = load_file(folder / "model.safetensors")
  return json.loads((folder / "config.json").read_text()), tensors


@pytest.mark.parametrize(("layout", "family", "options"), MODELS)
def test_round_trip_is_bitwise(tmp_path, layout, family, options):
  model = random_model(model_config(family, **{"layers": 5} | options))
  name = save_hf(model, str(tmp_path / "first"))
  assert name.startswith(layout)
  loaded = load_hf(str(tmp_path / "first"))
  params, expected = get_params(loaded), get_params(unrolled(model))
  assert params.keys() == expected.keys()
  for key, value in params.items():
    np.testing.assert_array_equal(value, expected[key], err_msg=key)
    assert value.dtype == np.float32, key

  assert save_hf(loaded, str(tmp_path / "second")) == name
  (config, tensors), (config_again, again) = (_files(tmp_path / n) for n in ("first", "second"))
  assert config == config_again
  assert tensors.keys() == again.keys()
  for key, value in tensors.items():
    np.testing.assert_array_equal(value, again[key], err_msg=key)
    assert value.dtype == np.float32, key


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "family", "options"), [
    (layout, family, options) for layout, family, options in MODELS if layout != "dense_jax"
])
def test_what_comes_back_is_the_same_function(tmp_path, layout, family, options):
  """Options that the shapes of parameters do not determine are restored from config.json."""
  model = unrolled(random_model(model_config(family, **options | {"norm_eps": 0.01})))
  save_hf(model, str(tmp_path / "saved"))
  loaded, tokens = load_hf(str(tmp_path / "saved")), random_tokens(0, 2, 9)
  run = fast_jit(lambda model, tokens: model(tokens))
  difference = np.abs(run(loaded, tokens) - run(model, tokens)).max()
  assert difference < 1e-4  # Their chunk lengths may differ.


@pytest.mark.parametrize("family", ["mamba", "mamba2", "transformer", "gau_retnet"])
def test_every_option_of_a_family_comes_back(tmp_path, family):
  """A new option of a family must be added to the family's layout, or be refused by it."""
  values = {
      "mamba": {"dt_rank": 3},
      "mamba2": {"head_dim": 4, "groups": 2, "dt_limit_min": 0.01, "dt_limit_max": 0.4},
      "transformer": {"heads": 2, "kv_heads": 1, "head_dim": 6, "rope_theta": 77.0,
                      "context": 9, "ffn_width": 20},
      "gau_retnet": {"heads": 4, "key_dim": 24, "expand": 3},
  }[family]
  if family.startswith("mamba"):
    values |= {"expand": 3, "state_size": 5, "conv_width": 3, "dt_min": 0.002, "dt_max": 0.2,
               "dt_floor": 0.0003}
  mixer = FAMILIES[family].config(**values)
  fields = {field.name: field.default for field in dataclasses.fields(mixer)}
  assert all(getattr(mixer, name) != default for name, default in fields.items())
  if family == "gau_retnet":
    values |= RELEASED | {"expand": 2}
  config = model_config(family, **values, norm_eps=0.01, tie_embeddings=True)
  assert choose(config)[0] != "dense_jax"
  save_hf(random_model(config), str(tmp_path / "saved"))
  loaded = load_hf(str(tmp_path / "saved")).config
  assert defaults(loaded) == defaults(dataclasses.replace(
      config, block_layers=config.layers, chunk=0, dense=loaded.dense))


def test_the_own_layout_keeps_the_whole_configuration(tmp_path):
  config = model_config("mamba", 2, dtype="bfloat16", remat="full", transition="mlp", layers=4)
  save_hf(random_model(config), str(tmp_path / "saved"), bos_token_id=1)
  loaded = load_hf(str(tmp_path / "saved")).config
  assert loaded == dataclasses.replace(config, block_layers=4)


def test_special_tokens_are_said(tmp_path):
  model = random_model(model_config("mamba"))
  save_hf(model, str(tmp_path / "said"), bos_token_id=3, eos_token_id=4)
  save_hf(model, str(tmp_path / "unsaid"))
  keys = ("bos_token_id", "eos_token_id", "pad_token_id")
  said, unsaid = (_files(tmp_path / name)[0] for name in ("said", "unsaid"))
  assert [said[key] for key in keys] == [3, 4, None]
  assert [unsaid[key] for key in keys] == [None] * 3


def test_a_destination_that_holds_something_is_refused_and_left_alone(tmp_path):
  model = random_model(model_config("mamba"))
  (tmp_path / "file").write_text("text")
  (tmp_path / "folder").mkdir()
  (tmp_path / "folder" / "thing").write_text("text")
  for name in ("file", "folder"):
    with pytest.raises(InputError, match="a folder that is empty or does not exist yet"):
      save_hf(model, str(tmp_path / name))
  assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder", "thing"]
  (tmp_path / "empty").mkdir()
  for name in ("empty", "a/new/one"):
    save_hf(model, str(tmp_path / name))
    assert sorted(os.listdir(tmp_path / name)) == ["config.json", "model.safetensors"]


def test_nothing_is_left_where_writing_fails(tmp_path, monkeypatch):
  def fail(*args, **options):
    raise OSError("no space left")

  monkeypatch.setattr("safetensors.numpy.save_file", fail)
  with pytest.raises(OSError, match="no space left"):
    save_hf(random_model(model_config("mamba")), str(tmp_path / "saved"))
  assert not list(tmp_path.iterdir())


def _changed(tmp_path, family, **changes):
  """Saves a model and changes keys of its config.json; returns the folder."""
  folder = tmp_path / "saved"
  save_hf(random_model(model_config(family)), str(folder))
  config = json.loads((folder / "config.json").read_text()) | changes
  (folder / "config.json").write_text(json.dumps(config))
  return str(folder)


@pytest.mark.parametrize(("family", "key", "value", "valid"), [
    ("mamba", "use_bias", True, "False"),
    ("mamba", "use_conv_bias", False, "True"),
    ("mamba", "hidden_act", "gelu", "'silu'"),
    ("mamba", "intermediate_size", 40, "32"),
    ("mamba", "expand", 1.5, "an integer >= 1"),
    ("mamba", "conv_kernel", 1, "an integer >= 2"),
    ("mamba", "time_step_rank", "all", "an integer >= 1"),
    ("mamba", "layer_norm_epsilon", 0, "a number > 0"),
    ("mamba", "tie_word_embeddings", 1, "False or True"),
    ("mamba2", "num_heads", 3, "expand * hidden_size / head_dim = 32 / 8"),
    ("mamba2", "time_step_limit", [0.5, 0.1], "[min, max]"),
    ("mamba2", "time_step_limit", "none", "[min, max]"),
    ("transformer", "attention_bias", True, "False"),
    ("transformer", "mlp_bias", True, "False"),
    ("transformer", "rope_scaling", {"type": "linear", "factor": 2.0}, "rope_type default"),
    ("transformer", "rope_parameters", {"rope_type": "llama3"}, "rope_type default"),
    ("transformer", "rope_parameters", {"partial_rotary_factor": 0.5}, "rope_type default"),
    ("transformer", "rope_parameters", {"rope_theta": -1}, "a number > 0"),
])
def test_an_unsupported_value_is_named(tmp_path, family, key, value, valid):
  with pytest.raises(InputError) as error:
    load_hf(_changed(tmp_path, family, **{key: value}))
  name = "rope_theta" if value == {"rope_theta": -1} else key
  shown = value["rope_theta"] if name == "rope_theta" else value
  for part in (f"config.json: {name} = {shown!r}", "is not valid: expected", valid):
    assert part in str(error.value)


@pytest.mark.parametrize(("key", "value", "valid"), [
    ("format_version", 2, "format_version = 2 is not valid: expected 1"),
    ("model", None, "the keys of a model's configuration"),
    ("model", {"widht": 3}, "unknown key config.json: model.widht; did you mean"),
    ("model", {"family": "mambo"}, "did you mean mamba"),
])
def test_a_bad_configuration_of_the_own_layout_is_named(tmp_path, key, value, valid):
  with pytest.raises(InputError, match=valid.replace(".", r"\.")):
    load_hf(_changed(tmp_path, "gau_retnet", **{key: value}))


def test_both_forms_of_rotary_parameters(tmp_path):
  def theta(**changes):
    (tmp_path / str(len(os.listdir(tmp_path)))).mkdir()
    folder = tmp_path / str(len(os.listdir(tmp_path)) - 1)
    return load_hf(_changed(folder, "transformer", **changes)).config.mixer.rope_theta

  assert theta(rope_theta=5e5, rope_parameters=None) == 5e5
  assert theta(rope_theta=None, rope_parameters={"rope_theta": 3e5}) == 3e5
  assert theta(rope_theta=7e4, rope_parameters=None, rope_scaling={"type": "default"}) == 7e4
  assert theta(rope_theta=None, rope_parameters=None) == 1e4


@pytest.mark.parametrize("infinity", [math.inf, {"__float__": "Infinity"}])
def test_no_limit_of_dt_in_both_forms(tmp_path, infinity):
  mixer = load_hf(_changed(tmp_path, "mamba2", time_step_limit=[0.25, infinity])).config.mixer
  assert (mixer.dt_limit_min, mixer.dt_limit_max) == (0.25, 0.0)


def test_the_last_kind_has_every_model():
  for family in FAMILIES:
    assert KINDS[-1].config_json(model_config(family)) is not None

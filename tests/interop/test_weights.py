"""Sharded, damaged and hostile checkpoints: the right tensors, or an error that names the file."""

import json
import os
import pathlib
import struct
import sys
import types

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dense_jax.errors import InputError
from dense_jax.interop import load_hf, save_hf
from dense_jax.interop.weights import read_index, read_tensors
from dense_jax.models.params import get_params
from tests.builders import model_config, random_model

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """The folder of a saved model with a tied head."""
  folder = tmp_path_factory.mktemp("weights") / "saved"
  save_hf(random_model(model_config("mamba", tie_embeddings=True)), str(folder))
  return folder


def _index(shards):
  return json.dumps({"metadata": {"total_size": 1}, "weight_map": shards})


def _write(folder, config, files, index):
  """Writes a folder with a config.json, shards (file -> tensors) and an index."""
  folder.mkdir()
  (folder / "config.json").write_text(config)
  for name, tensors in files.items():
    (folder / name).parent.mkdir(exist_ok=True)
    save_file(tensors, folder / name)
  (folder / INDEX).write_text(index)
  return folder


def _assert_same(folder, expected):
  for name, value in get_params(load_hf(str(folder))).items():
    np.testing.assert_array_equal(value, expected[name], err_msg=name)


@pytest.mark.parametrize("names", [(ONE, TWO), (TWO, ONE), ("a/one.safetensors", "b.safetensors")])
@pytest.mark.parametrize("stale", ["none", "first", "second", "both", "unknown"])
def test_each_tensor_is_the_one_of_the_shard_that_the_index_names(tmp_path, saved, names, stale):
  tensors = load_file(saved / "model.safetensors")
  half = dict.fromkeys(sorted(tensors)[::2], names[0])
  shards = {name: half.get(name, names[1]) for name in tensors}
  wrong = {name: np.full_like(value, 7) for name, value in tensors.items()}
  files = {}
  for file, which in zip(names, ("first", "second"), strict=True):
    others = wrong if stale in (which, "both") else {}
    files[file] = others | {name: tensors[name] for name in tensors if shards[name] == file}
    if stale == "unknown":  # A tensor that the index does not name is not read.
      files[file]["model.extra"] = np.zeros(3, np.float32)
  config = (saved / "config.json").read_text()
  folder = _write(tmp_path / "sharded", config, files, _index(shards))
  _assert_same(folder, get_params(load_hf(str(saved))))


def test_shards_of_pytorch_follow_their_index_too(tmp_path, saved, monkeypatch):
  class Tensor:
    def __init__(self, value):
      self.value = value

    def float(self):
      return self

    def numpy(self):
      return self.value

  tensors = load_file(saved / "model.safetensors")
  names = sorted(tensors)
  shards = {name: "b.bin" if name in names[:5] else "a.bin" for name in names}
  wrong = {name: Tensor(np.full_like(tensors[name], 7)) for name in names}

  def load(file, **options):
    return wrong | {n: Tensor(tensors[n]) for n in names if shards[n] == pathlib.Path(file).name}

  torch = types.ModuleType("torch")
  torch.load = load
  monkeypatch.setitem(sys.modules, "torch", torch)
  (tmp_path / "config.json").write_text((saved / "config.json").read_text())
  (tmp_path / "pytorch_model.bin.index.json").write_text(_index(shards))
  for name in ("a.bin", "b.bin"):
    (tmp_path / name).touch()
  _assert_same(tmp_path, get_params(load_hf(str(saved))))

  # A file may hold anything but tensors by name, and a damaged one can raise anything.
  for content, message in [
      ([1, 2], "expected tensors by name"), ({3: Tensor(0)}, "expected tensors by name"),
      ({name: "text" for name in names}, "no dense tensor"),
      ({name: {"nested": 1} for name in names}, "no dense tensor"),
      ({"x": Tensor(0)}, r"a\.bin lacks tensors that the index says it has"),
      (EOFError("Ran out of input"), "not a file of PyTorch weights alone: Ran out of input"),
      (KeyError("x"), "not a file of PyTorch weights alone"),
      (IndexError("pop from empty list"), "not a file of PyTorch weights alone"),
  ]:
    def load_content(file, content=content, **options):
      if isinstance(content, Exception):
        raise content
      return content

    torch.load = load_content
    with pytest.raises(InputError, match=message):
      load_hf(str(tmp_path))


def test_one_file_goes_before_shards(tmp_path, saved):
  """As in transformers, an index beside a single file is not read."""
  (tmp_path / "model.safetensors").symlink_to(saved / "model.safetensors")
  (tmp_path / "config.json").symlink_to(saved / "config.json")
  (tmp_path / INDEX).write_text("{")
  _assert_same(tmp_path, get_params(load_hf(str(saved))))


def test_a_shard_may_be_a_link_out_of_the_folder(tmp_path, saved):
  """Links out of the folder are made by its owner, not by the index: Hugging Face's cache does."""
  (tmp_path / "config.json").symlink_to(saved / "config.json")
  (tmp_path / ONE).symlink_to(saved / "model.safetensors")
  (tmp_path / INDEX).write_text(_index(dict.fromkeys(load_file(saved / "model.safetensors"), ONE)))
  _assert_same(tmp_path, get_params(load_hf(str(saved))))


@pytest.mark.parametrize("shard", [
    "../saved/model.safetensors", "a/../../x", "..", "/etc/passwd", "~/../x/../../y", "..\\x",
    "C:\\x", "C:x", "\\\\host\\x", "", ".", "nul\0byte", 3, None, True, ["x"], {"a": "b"},
])
def test_an_index_that_leads_out_of_its_folder_is_named(tmp_path, shard):
  (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"good": ONE, "bad": shard}}))
  with pytest.raises(InputError, match=r"index\.json is not valid: .*bad is said to be in"):
    read_index(tmp_path / INDEX)


@pytest.mark.parametrize("content", [
    b"", b"{", b'{"weight_map": {"a": "x"', b"[]", b"3", b'"text"', b"null", b"{}", b"\xff\xfe\xfd",
    b'{"weight_map": []}', b'{"weight_map": {}}', b'{"weight_map": "x"}', b'{"weight_map": null}',
    b"[" * 10**6, b'{"weight_map": ' * 10**5, b'{"weight_map": {"a": ' + b"9" * 5000 + b"}}",
    b'{"weight_map": {"a": "x", "a": "y"}}', b'{"weight_map": {"a": "x"}, "weight_map": {}}',
])
def test_a_bad_index_is_named(tmp_path, content):
  (tmp_path / INDEX).write_bytes(content)
  with pytest.raises(InputError, match=r"index\.json is not valid: expected an object with a"):
    read_index(tmp_path / INDEX)


def test_shards_that_lack_something_are_named(tmp_path):
  (tmp_path / INDEX).write_text(_index({"a": ONE, "b": TWO, "c\x1b[31m": ONE}))
  with pytest.raises(InputError, match=f"names files that do not exist: {ONE}, {TWO}"):
    read_tensors(tmp_path)
  save_file({"a": np.zeros(2, np.float32)}, tmp_path / ONE)
  (tmp_path / TWO).mkdir()
  with pytest.raises(InputError, match=f"names files that do not exist: {TWO}"):
    read_tensors(tmp_path)
  (tmp_path / TWO).rmdir()
  save_file({"a": np.zeros(2, np.float32)}, tmp_path / TWO)
  with pytest.raises(InputError, match=f"{ONE} lacks tensors .*: 'c.x1b.31m'$"):
    read_tensors(tmp_path)
  (tmp_path / ONE).write_bytes((tmp_path / ONE).read_bytes()[:-1])
  with pytest.raises(InputError, match=f"{ONE} is not a whole safetensors file"):
    read_tensors(tmp_path)


def _raw(header, data=b"\0" * 8, length=None):
  """Returns the bytes of a safetensors file."""
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  return struct.pack("<Q", len(text) if length is None else length) + text + data


def _tensor(dtype="F32", shape=(2,), begin=0, end=8):
  return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize("content", [
    b"", b"\1\2", _raw({}, length=2**62), _raw({}, length=100), _raw(b"{cut"), _raw([]),
    _raw(b'{"\xff": 1}'), _raw(b"[" * 10**6), _raw({"a": _tensor(end=10**15)}),
    _raw({"a": _tensor(), "b": _tensor(begin=4, end=12)}, b"\0" * 12),
    _raw({"a": _tensor(), "b": _tensor(begin=16, end=24)}, b"\0" * 24),
    _raw({"a": _tensor(shape=(3,))}), _raw({"a": _tensor(shape=(2**62, 4))}),
    _raw({"a": _tensor(shape=(-1,))}), _raw({"a": _tensor("F99")}),
    _raw({"a": _tensor()}, b"\0" * 99),
    _raw({"a\x1b[31m": _tensor(begin=8, end=0)}),
])
def test_a_safetensors_file_that_lies_is_named(tmp_path, content):
  (tmp_path / "model.safetensors").write_bytes(content)
  with pytest.raises(InputError, match=r"model\.safetensors is not a whole safetensors") as error:
    read_tensors(tmp_path)
  assert str(error.value).isprintable()


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2"])
def test_numbers_of_an_unknown_kind_are_named(tmp_path, dtype):
  (tmp_path / "model.safetensors").write_bytes(_raw({"a": _tensor(dtype, (8,))}))
  with pytest.raises(InputError, match=r"model\.safetensors has numbers of an unknown kind"):
    read_tensors(tmp_path)


def _changed(tmp_path, saved, change):
  """Writes the saved model with changed tensors; returns the folder."""
  tensors = dict(load_file(saved / "model.safetensors"))
  change(tensors)
  save_file(tensors, tmp_path / "model.safetensors")
  (tmp_path / "config.json").write_text((saved / "config.json").read_text())
  return tmp_path


EMBEDDING, OTHER = "backbone.embeddings.weight", "backbone.embedding.weight"


@pytest.mark.parametrize("names", [["lm_head.weight"], [OTHER], ["lm_head.weight", OTHER]])
@pytest.mark.parametrize("alone", [False, True])
def test_names_of_one_tensor_that_agree(tmp_path, saved, names, alone):
  def change(tensors):
    for name in names:
      tensors[name] = tensors[EMBEDDING].copy()
    if alone:
      del tensors[EMBEDDING]

  _assert_same(_changed(tmp_path, saved, change), get_params(load_hf(str(saved))))


@pytest.mark.parametrize("name", ["lm_head.weight", OTHER])
@pytest.mark.parametrize("other", ["value", "shape"])
def test_names_of_one_tensor_that_differ_are_refused(tmp_path, saved, name, other):
  """If two names of one tensor disagree, no choice between them would be safe."""
  def change(tensors):
    value = tensors[EMBEDDING].copy()
    value[3, 2] += 1
    tensors[name] = value if other == "value" else value[:-1].copy()

  with pytest.raises(InputError, match=f"different: {name} and {EMBEDDING}, which are one tensor"):
    load_hf(str(_changed(tmp_path, saved, change)))


def test_integers_are_no_weights(tmp_path, saved):
  """Integers are quantised weights, which are useless without their scales."""
  name = "backbone.norm_f.weight"

  def change(tensors):
    tensors[name] = np.ones_like(tensors[name], np.int8)

  with pytest.raises(InputError, match=f"dtype: {name} is int8, expected floating-point numbers"):
    load_hf(str(_changed(tmp_path, saved, change)))


@pytest.mark.parametrize("content", [
    b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 10**6, b'{"a": ' + b"9" * 5000 + b"}",
])
def test_a_bad_config_is_named(tmp_path, content):
  (tmp_path / "config.json").write_bytes(content)
  with pytest.raises(InputError, match=r"config\.json is not"):
    load_hf(str(tmp_path))


@pytest.mark.parametrize("key", [
    "num_hidden_layers", "hidden_size", "vocab_size", "state_size", "expand", "conv_kernel",
    "layer_norm_epsilon", "time_step_max",
])
@pytest.mark.parametrize("value", [10**9, 10**18, 10**400])
def test_absurd_sizes_are_refused_at_once(tmp_path, saved, key, value):
  config = json.loads((saved / "config.json").read_text()) | {key: value}
  config.pop("intermediate_size")
  (tmp_path / "config.json").write_text(json.dumps(config))
  (tmp_path / "model.safetensors").symlink_to(saved / "model.safetensors")
  if isinstance(value, int) and key in ("layer_norm_epsilon", "time_step_max") and value < 1e308:
    load_hf(str(tmp_path))  # A valid float.
    return
  with pytest.raises(InputError, match=f"config.json: {key}|does not fit its config.json"):
    load_hf(str(tmp_path))


@pytest.mark.parametrize("model", [
    {"layers": 10**9}, {"layers": True}, {"family": []}, {"family": None}, {"layers": "2"},
])
def test_absurd_sizes_of_the_own_layout_are_refused(tmp_path, model):
  config = {"model_type": "dense_jax", "format_version": 1, "model": model}
  (tmp_path / "config.json").write_text(json.dumps(config))
  with pytest.raises(InputError):
    load_hf(str(tmp_path))


def test_paths_below_home_and_in_buckets(tmp_path, saved, monkeypatch):
  monkeypatch.setenv("HOME", str(saved.parent))
  monkeypatch.chdir(tmp_path)
  model = load_hf("~/saved")
  save_hf(model, "~/again")
  assert (saved.parent / "again" / "config.json").is_file()
  assert not list(tmp_path.iterdir())
  monkeypatch.setattr("dense_jax.files._reads_buckets", lambda: True)
  for call in (lambda: load_hf("gs://b/x"), lambda: save_hf(model, "gs://b/x")):
    with pytest.raises(InputError, match=r"^path = 'gs://b/x' is not valid: .* on this machine"):
      call()


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002, 0o077])
def test_files_have_the_mode_that_the_umask_gives(tmp_path, umask):
  model = random_model(model_config("mamba"))
  (tmp_path / "there").mkdir(mode=0o750)
  before = os.umask(umask)
  try:
    for name in ("a/b", "there"):
      save_hf(model, str(tmp_path / name), files={"tokenizer.model": b"model"})
  finally:
    os.umask(before)
  modes = {p.name: p.stat().st_mode & 0o777 for p in (tmp_path / "a").rglob("*")}
  files = dict.fromkeys(("config.json", "model.safetensors", "tokenizer.model"), 0o666 & ~umask)
  assert modes == {"b": 0o777 & ~umask} | files
  assert (tmp_path / "there").stat().st_mode & 0o777 == 0o750  # Unchanged.

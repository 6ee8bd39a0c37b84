"""State files: going on from one equals never having stopped, and no other model takes it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dense_jax.data.tokenizer import ByteTokenizer
from dense_jax.errors import InputError
from dense_jax.generation.generator import Generator
from dense_jax.generation.requests import Prefix, Request
from dense_jax.generation.sampling import Sampling
from dense_jax.generation.state_file import StateFiles, params_fingerprint
from dense_jax.models.params import get_params, unrolled, with_params
from tests.builders import (
  FAMILIES,
  QUICK_FAMILIES,
  SLOW_FAMILIES,
  kind_name,
  model_config,
  random_model,
  random_state,
)
from tests.generation.tokenizers import Letters

SAMPLING = Sampling(0.9, top_k=8, repetition_penalty=1.2)
KINDS = [
    (family, depth, "state") for family in FAMILIES for depth in (0, 2)
    if family != "transformer" or not depth
]


def _model(kind=("mamba", 2, "state"), **options):
  family, depth, inject = kind
  return random_model(model_config(family, depth, inject, **options))


def _kinds(quick):
  """Marks kinds: the quick ones, those of slow families, and all others as exhaustive."""
  def marks(kind):
    if kind in quick:
      return ()
    return pytest.mark.slow if kind[0] in SLOW_FAMILIES else pytest.mark.exhaustive

  return pytest.mark.parametrize(
      "kind", [pytest.param(kind, id=kind_name(kind), marks=marks(kind)) for kind in KINDS]
  )


def _assert_goes_on(kind, counts, tmp_path, **options):
  """Asserts that stopping after each of `counts` tokens changes nothing, to the last bit."""
  path = str(tmp_path / "state")
  model = _model(kind, **options)
  generator, again = (Generator(model, Letters(), batch_size=1) for _ in range(2))
  files = StateFiles("a model", model, Letters())
  sizes = set()
  whole = Request([3, 1, 4], SAMPLING, max(counts) + 8, seed=5, keep_state=True)
  (unbroken,) = generator([whole])
  for count in counts:
    (before,) = generator([dataclasses.replace(whole, max_new_tokens=count)])
    files.save(before.prefix, path, "--save-state")
    sizes.add((tmp_path / "state").stat().st_size)
    rest = dataclasses.replace(
        whole, ids=(), max_new_tokens=whole.max_new_tokens - count,
        prefix=files.load(path, "--from-state"),
    )
    (after,) = again([rest])
    assert before.ids + after.ids == unbroken.ids
    assert before.log_probs + after.log_probs == unbroken.log_probs
    assert before.text + after.text == unbroken.text
    for mine, other in zip(_leaves(after.prefix), _leaves(unbroken.prefix), strict=True):
      np.testing.assert_array_equal(mine, other)
  # A few ids more or less at the beginning.
  assert max(sizes) - min(sizes) < 300


def _leaves(prefix):
  return jax.tree.leaves((prefix.state, prefix.logits_V, prefix.seen_V, prefix.last_ids))


@_kinds([(family, depth, "state") for family in QUICK_FAMILIES for depth in (0, 2)][1:3])
def test_going_on_from_a_file_equals_never_having_stopped(kind, tmp_path):
  _assert_goes_on(kind, (1, 63, 64), tmp_path)


@_kinds([])
def test_going_on_after_thousands_of_tokens(kind, tmp_path):
  _assert_goes_on(kind, (1, 63, 64, 5000), tmp_path)


def test_states_in_bfloat16_come_back(tmp_path):
  model = _model(vocab_size=258, dtype="bfloat16", state_dtype="bfloat16")
  prefix = Prefix(
      random_state(unrolled(model), [5]), jnp.zeros(258), jnp.zeros(258, bool), (1,)
  )
  files = StateFiles("a model", model, ByteTokenizer())
  files.save(prefix, str(tmp_path / "state"), "--save-state")
  loaded = files.load(str(tmp_path / "state"), "--from-state")
  assert {str(leaf.dtype) for leaf in jax.tree.leaves(loaded.state)} == {"int32", "bfloat16"}
  for mine, other in zip(_leaves(loaded), _leaves(prefix), strict=True):
    np.testing.assert_array_equal(mine, other)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"state_dtype": "bfloat16"}])
def test_going_on_in_other_dtypes(options, tmp_path):
  for kind in (("mamba", 2, "state"), ("gau_retnet", 0, "state")):
    _assert_goes_on(kind, (1, 63, 64, 5000), tmp_path, **options)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  """Returns a state file's content, its model, and the prefix."""
  model = _model(vocab_size=258)
  prefix = Generator(model, batch_size=1).read(list("a→".encode()[:-1]))
  path = tmp_path_factory.mktemp("state") / "deep" / "state"
  StateFiles("step 4 of runs/a", model, ByteTokenizer()).save(prefix, str(path), "--save-state")
  assert [file.name for file in path.parent.iterdir()] == ["state"]
  return path.read_bytes(), model, prefix


def _load(content, tmp_path, model, name="step 9 of runs/b", tokenizer=None):
  (tmp_path / "state").write_bytes(content)
  files = StateFiles(name, model, tokenizer or ByteTokenizer())
  return files.load(str(tmp_path / "state"), "--from-state")


def test_all_parts_come_back(written, tmp_path):
  content, model, prefix = written
  loaded = _load(content, tmp_path, model)
  for mine, other in zip(_leaves(loaded), _leaves(prefix), strict=True):
    np.testing.assert_array_equal(mine, other)
  # The bytes of a character that the continuation completes are among them.
  assert bytes(loaded.last_ids) == "a→".encode()[:-1]


def test_a_state_serves_every_form_of_the_same_model(written, tmp_path):
  content, model, _ = written
  config = dataclasses.replace(
      model.config, state_dtype="bfloat16", remat="full", implementation="associative", chunk=2
  )
  loaded = _load(content, tmp_path, with_params(_model(vocab_size=258), get_params(model)))
  rounded = _load(content, tmp_path, random_model(config))
  for mine, other in zip(_leaves(rounded), _leaves(loaded), strict=True):
    if isinstance(mine, jax.Array):
      np.testing.assert_array_equal(mine, other.astype(mine.dtype))
  assert any(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(rounded.state))


def test_damaged_files_are_refused(written, tmp_path):
  content, model, _ = written
  size = 8 + int.from_bytes(content[:8], "little")
  flipped = [
      content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
      for at in (0, 7, 20, size - 30, size, size + 100, len(content) - 1)
  ]
  cut = [content[:at] for at in (0, 4, 8, size - 1, size, len(content) - 1)]
  for wrong in [*flipped, *cut, content + b"\0", b"text\n" * 100]:
    with pytest.raises(InputError, match=r"--from-state = .* is not valid"):
      _load(wrong, tmp_path, model)


def test_foreign_files_are_refused(written, tmp_path):
  from safetensors.numpy import save

  _, model, _ = written
  for metadata in (None, {"format": "pt"}, {"format": "dense_jax state", "version": "99"}):
    with pytest.raises(InputError, match=r"--from-state = .* that --save-state wrote"):
      _load(save({"x": np.zeros(3, np.float32)}, metadata), tmp_path, model)
  for path in ("no such file", "."):
    with pytest.raises(InputError, match="--from-state = "):
      StateFiles("", model, ByteTokenizer()).load(path, "--from-state")


def test_the_state_of_another_model_is_refused_by_name(written, tmp_path):
  content, model, _ = written
  params = get_params(model)
  name = next(iter(params))
  others = {
      "its parameters are others": with_params(model, params | {name: params[name] + 1e-6}),
      "config.model.layers is 3, here 4": _model(layers=4, vocab_size=258),
      "config.model.norm_eps is 1e-05, here 1.0": with_params(
          _model(norm_eps=1.0, vocab_size=258), params
      ),
      "config.model.family is 'mamba', here 'gau_retnet'": _model(
          ("gau_retnet", 2, "state"), vocab_size=258
      ),
  }
  for why, other in others.items():
    with pytest.raises(
        InputError, match=r"a state of step 9 of runs/b; it is one of step 4 of runs/a: "
    ) as raised:
      _load(content, tmp_path, other)
    assert why in str(raised.value)
  with pytest.raises(InputError, match="its tokenizer is another"):
    _load(content, tmp_path, model, tokenizer=Letters())


def test_a_failed_write_leaves_the_old_file(written, tmp_path, monkeypatch):
  content, model, prefix = written
  (tmp_path / "state").write_bytes(content)
  files = StateFiles("a model", model, ByteTokenizer())

  def fail(*args):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr("os.fsync", fail)
  with pytest.raises(InputError, match=r"--save-state = .*No space left"):
    files.save(prefix, str(tmp_path / "state"), "--save-state")
  assert [file.name for file in tmp_path.iterdir()] == ["state"]
  assert (tmp_path / "state").read_bytes() == content


def test_the_fingerprint_does_not_depend_on_how_layers_are_scanned():
  scanned = _model(("mamba", 0, "state"), layers=4, block_layers=1)
  assert scanned.stack.scanned_layers
  assert params_fingerprint(scanned) == params_fingerprint(unrolled(scanned))

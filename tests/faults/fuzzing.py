"""Fuzzing of what a run reads that others may have written: no error but InputError.

    python -m tests.faults.fuzzing --examples 3000

Each target is a folder with valid files, and a check that reads them after hypothesis has changed
one. While it reads, no process may be started, no connection opened, nothing unpickled, and no file
be written outside the folder. It prints how many examples each target has survived.
"""

import argparse
import contextlib
import json
import os
import pathlib
import re
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

# Audit events that nothing here has a reason for.
_FORBIDDEN = re.compile(
    r"subprocess\.|os\.(system|exec|posix_spawn|fork)|socket\.connect|pickle\.find_class"
)
# Event -> the place of the argument that says to which open folder the path is relative, if any.
_CHANGES = {
    "os.rename": None, "os.truncate": None, "shutil.rmtree": 1, "os.remove": 1, "os.rmdir": 1,
    "os.mkdir": 2,
}

# No lambda is given to hypothesis, which parses those to describe them: of two that parse at once
# Python 3.11 fails with a SystemError, as tests/syntax.py says.


def json_collections(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
  """Returns lists and dictionaries of JSON values."""
  return st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)


def _encoded(values: Any) -> bytes:
  return json.dumps(values).encode()


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(2**62, 2**70)
    | st.floats(allow_nan=True) | st.text(max_size=9)
    | st.sampled_from(["../../etc", "/etc/passwd", "nan", "__reduce__", "\x00", "gs://b"]),
    json_collections, max_leaves=6,
)


def changed_bytes(content: bytes) -> st.SearchStrategy[bytes]:
  """Returns the content with bytes flipped, cut off, repeated or put in."""
  places = st.integers(0, max(len(content) - 1, 0))

  def flip(where: list[tuple[int, int]]) -> bytes:
    changed = bytearray(content)
    for place, mask in where:
      changed[place] ^= mask
    return bytes(changed)

  def cut(end: int) -> bytes:
    return content[:end]

  def put(drawn: tuple[int, bytes]) -> bytes:
    place, more = drawn
    return content[:place] + more + content[place:]

  return st.one_of(
      st.lists(st.tuples(places, st.integers(1, 255)), min_size=1, max_size=4).map(flip),
      places.map(cut), st.tuples(places, st.binary(max_size=9)).map(put), st.binary(max_size=64),
  )


def changed_json(values: Any) -> st.SearchStrategy[Any]:
  """Returns the values with one of them, at any depth, replaced, removed or renamed."""
  paths = list(_paths(values))

  def change(drawn: tuple[tuple[Any, ...], str, Any, str]) -> Any:
    path, how, value, name = drawn
    copy = json.loads(json.dumps(values))
    if not path:
      return value
    node = copy
    for key in path[:-1]:
      node = node[key]
    old = node[path[-1]]
    if how == "replace":
      node[path[-1]] = value
    elif isinstance(node, dict):
      del node[path[-1]]
      if how == "rename":
        node[name] = old
    else:
      node.append(value)
    return copy

  return st.tuples(
      st.sampled_from(paths), st.sampled_from(["replace", "remove", "rename"]), JSON_VALUES,
      st.text(max_size=9),
  ).map(change)


def _paths(values: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
  yield path
  items = values.items() if isinstance(values, dict) else (
      enumerate(values[:4]) if isinstance(values, list) else ())
  for key, value in [*items][:12]:
    yield from _paths(value, (*path, key))


def changed_file(content: bytes) -> st.SearchStrategy[bytes]:
  """Returns the content of a file changed as bytes and, if it is JSON, as values."""
  changed = changed_bytes(content)
  with contextlib.suppress(ValueError):
    values = changed_json(json.loads(content))
    changed |= values.map(_encoded)
  return changed


def changed_header(content: bytes) -> st.SearchStrategy[bytes]:
  """Returns a safetensors file with its header changed, as values, as bytes or in its length."""
  (size,) = struct.unpack("<Q", content[:8])
  header, rest = content[8 : 8 + size], content[8 + size :]

  def joined(new: bytes) -> bytes:
    return struct.pack("<Q", len(new)) + new + rest

  def with_length(length: int) -> bytes:
    return struct.pack("<Q", length) + header + rest

  values = changed_json(json.loads(header)).map(_encoded).map(joined)
  lengths = st.integers(0, 2**64 - 1).map(with_length)
  return values | changed_bytes(header).map(joined) | lengths | changed_bytes(content)


class Watch:
  """Notes what is done that reading has no reason for; a context."""

  def __init__(self) -> None:
    self.folder, self.seen = "", []
    self._active = False
    sys.addaudithook(self._hook)

  def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
    if not self._active:
      return
    if _FORBIDDEN.match(event):
      self.seen.append(f"{event} {arguments!r}")
    written = event == "open" and isinstance(arguments[2], int) and arguments[2] & (
        os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    relative = _CHANGES.get(event)
    if relative is not None and arguments[relative] not in (None, -1):
      return  # Within a folder that was checked when it was opened, by shutil.rmtree.
    if written or event in _CHANGES:
      path = arguments[0]
      if isinstance(path, (str, os.PathLike)) and not self._is_allowed(os.path.abspath(path)):
        self.seen.append(f"{event} {path}")

  def _is_allowed(self, path: str) -> bool:
    return path.startswith((self.folder, "/dev/", os.path.expanduser("~/.cache/dense_jax")))

  @contextlib.contextmanager
  def over(self, folder: pathlib.Path) -> Iterator[None]:
    """Watches, and allows writing below a folder."""
    self.folder, self.seen, self._active = str(folder), [], True
    try:
      yield
    finally:
      self._active = False
    assert not self.seen, self.seen


# Returns the strategy of what is read, and what reads it; given an empty folder.
Target = Callable[[pathlib.Path], tuple[st.SearchStrategy[Any], Callable[[Any], None]]]


def _hugging_face_file(
    folder: pathlib.Path, name: str, load: Callable[[str], object]
) -> tuple[bytes, Callable[[bytes], None]]:
  """Saves a model in a Hugging Face layout; returns a file of it, and what reads it changed."""
  from dense_jax.interop import save_hf
  from tests.builders import model_config, random_model

  save_hf(random_model(model_config("mamba")), str(folder / "model"))
  file = folder / "model" / name

  def read(content: bytes) -> None:
    file.write_bytes(content)
    load(str(folder / "model"))

  return file.read_bytes(), read


def safetensors_headers(folder: pathlib.Path) -> tuple[st.SearchStrategy[Any], Callable]:
  """A model's weights in a Hugging Face layout."""
  from dense_jax.interop import load_hf

  content, read = _hugging_face_file(folder, "model.safetensors", load_hf)
  return changed_header(content), read


def hugging_face_configs(folder: pathlib.Path) -> tuple[st.SearchStrategy[Any], Callable]:
  """The config.json of a Hugging Face layout."""
  from dense_jax.interop.hugging_face import load_config

  content, read = _hugging_face_file(folder, "config.json", load_config)
  return changed_file(content), read


def config_overrides(folder: pathlib.Path) -> tuple[st.SearchStrategy[Any], Callable]:
  """Overrides on the command line: --config.KEY=VALUE."""
  del folder
  from dense_jax import experiment
  from dense_jax.cli.common import take_overrides
  from dense_jax.config import ExperimentConfig
  from dense_jax.runs import resume

  config = experiment.change(ExperimentConfig(), [])
  keys = [*resume.keys(config), "model", "model.mixer", "train", ""]
  names = st.sampled_from(keys) | st.text(max_size=12) | st.tuples(
      st.sampled_from(keys), st.text(max_size=3)).map(".".join)
  values = st.text(max_size=12) | st.integers().map(str) | st.floats().map(str) | st.sampled_from(
      ["true", "nan", "-inf", "1e400", "0", "-1", "transformer", "mamba2", "s4", "9" * 5000, "∞"])

  def read(overrides: list[tuple[str, str]]) -> None:
    _, taken = take_overrides([f"--config.{key}={value}" for key, value in overrides])
    changed = experiment.change(config, taken)
    resume.check(config, changed, 3)

  return st.lists(st.tuples(names, values), max_size=3), read


def run_configs(folder: pathlib.Path) -> tuple[st.SearchStrategy[Any], Callable]:
  """The config.json of a run."""
  from etils import epath

  from dense_jax import experiment
  from dense_jax.config import ExperimentConfig

  experiment.save(experiment.change(ExperimentConfig(), []), epath.Path(folder))
  file = folder / experiment.CONFIG_FILE

  def read(content: bytes) -> None:
    file.write_bytes(content)
    experiment.read(epath.Path(folder))

  return changed_file(file.read_bytes()), read


def checkpoint_files(folder: pathlib.Path) -> tuple[st.SearchStrategy[Any], Callable]:
  """Each file of a checkpoint but those of the numbers; what is read is what was saved."""
  import jax
  import jax.numpy as jnp
  from etils import epath

  from dense_jax.config import ModelConfig
  from dense_jax.training.checkpoint import Checkpoints, clear_uncommitted
  from dense_jax.training.host_arrays import placed_on
  from dense_jax.training.step import TrainState

  place = epath.Path(folder) / "checkpoints"
  state = TrainState(jnp.int32(1), {"w": jnp.arange(3.0)}, {"m": jnp.ones(3)})
  checkpoints = Checkpoints(place, ModelConfig())
  checkpoints.save(state, 1, {"step": 1}, 2.0)
  checkpoints.close()
  shapes = placed_on(state, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
  whole = {
      str(file.relative_to(folder)): file.read_bytes()
      for file in (folder / "checkpoints" / "1").rglob("*")
      if file.is_file() and file.parent.name != "d"
  }

  def read(drawn: tuple[str, bytes]) -> None:
    name, content = drawn
    (folder / name).write_bytes(content)
    try:
      clear_uncommitted(place)
      opened = Checkpoints(place, ModelConfig())
      try:
        restored, position = opened.restore_newest(shapes)
      finally:
        opened.close()
      assert position == {"step": 1} and restored.params["w"].tolist() == [0.0, 1.0, 2.0]
      assert int(restored.step) == 1 and restored.opt_state["m"].tolist() == [1.0, 1.0, 1.0]
    finally:
      (folder / name).write_bytes(whole[name])

  return st.one_of([
      st.tuples(st.just(name), changed_file(content)) for name, content in whole.items()
  ]), read


def proofs(folder: pathlib.Path) -> tuple[st.SearchStrategy[Any], Callable]:
  """The digests of a checkpoint, by somebody who makes their own SHA-256 fit."""
  del folder
  from dense_jax.errors import InputError
  from dense_jax.training.proof import ArrayProof, Proof, digest_json

  proof = Proof(3, {"params/w": ArrayProof("float32", (2,), "0" * 16)}, "", 2.5)
  values = {key: value for key, value in proof.to_json().items() if key != "sha256"}

  def read(changed: Any) -> None:
    if isinstance(changed, dict):
      changed = {**changed, "sha256": digest_json(changed)}
    try:
      Proof.parse(json.dumps(changed).encode())
    except ValueError as error:  # What reads a checkpoint makes an InputError of it.
      raise InputError(str(error)) from error

  return changed_json(values), read


TARGETS: dict[str, Target] = {
    "safetensors headers": safetensors_headers, "Hugging Face configs": hugging_face_configs,
    "config overrides": config_overrides, "config.json of runs": run_configs,
    "files of checkpoints": checkpoint_files, "digests of checkpoints": proofs,
}


def fuzz(target: Target, folder: pathlib.Path, examples: int, watch: Watch) -> tuple[int, int]:
  """Reads so many examples; returns how many there were, and how many of them were refused.

  Raises:
    Exception: an example raised something else than InputError, or did what it must not.
  """
  from dense_jax.errors import InputError

  strategy, read = target(folder)
  tried = refused = 0

  @settings(
      max_examples=examples, deadline=None, database=None, derandomize=True,
      suppress_health_check=[*HealthCheck], phases=[Phase.generate, Phase.shrink],
  )
  @given(strategy)
  def check(example: Any) -> None:
    nonlocal tried, refused
    tried += 1
    with watch.over(folder):
      try:
        read(example)
      except InputError:
        refused += 1

  check()
  return tried, refused


def main(arguments: Sequence[str]) -> int:
  """Fuzzes all targets, and prints a line for each."""
  command = argparse.ArgumentParser(prog="python -m tests.faults.fuzzing")
  command.add_argument("--examples", type=int, default=1000, help="of each target (default 1000)")
  options = command.parse_args(arguments)
  watch = Watch()
  for name, target in TARGETS.items():
    with tempfile.TemporaryDirectory() as folder:
      tried, refused = fuzz(target, pathlib.Path(folder), options.examples, watch)
    print(f"{name}: {tried} examples, {refused} refused, none did anything else", flush=True)
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))

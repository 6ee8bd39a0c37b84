"""Random damage to what the data side reads: InputError or the right thing, and nothing else.

Nothing is written outside the test's folder, and nothing is read there by a name from a damaged
file. `DENSE_JAX_FUZZ=20000 python -m pytest tests/data/corpus/test_fuzz.py` tries more.
"""

import contextlib
import gzip
import json
import os
import shutil
import sys

import numpy as np
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dense_jax.config import DataConfig
from dense_jax.config.mixture import parse_mixtures
from dense_jax.data.corpus import manifest as manifests
from dense_jax.data.corpus.documents import Reading, read_documents
from dense_jax.data.corpus.files import Input, Settings, finished
from dense_jax.data.corpus.opening import Corpus
from dense_jax.data.corpus.shards import read_index
from dense_jax.data.examples import read_examples
from dense_jax.data.reading import read_texts
from dense_jax.data.templates import NAMED
from dense_jax.errors import InputError
from tests.data.corpus.texts import DOCUMENTS, lines, run, write_corpus
from tests.faults.fuzzing import json_collections

EXAMPLES = int(os.environ.get("DENSE_JAX_FUZZ", "100"))
fuzz = settings(
    max_examples=EXAMPLES, deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20),
    st.sampled_from(["../../etc/passwd", "/etc/passwd", "a\0b", "x/../y", "~", "", "<u2", 10**400]),
)
VALUES = st.recursive(LEAVES, json_collections, max_leaves=6)
_OPENED: list[list[str]] = []


def _hook(event, arguments):
  if event == "open" and _OPENED and isinstance(arguments[0], str | bytes | os.PathLike):
    _OPENED[-1].append(os.fsdecode(arguments[0]))


sys.addaudithook(_hook)


@contextlib.contextmanager
def _opens_only(folder):
  """Fails if a file that is not in the folder is opened inside; libraries' own are left out."""
  _OPENED.append([])
  try:
    yield
  finally:
    opened = _OPENED.pop()
  own = os.path.realpath(folder)
  others = (sys.prefix, sys.base_prefix, "/proc", "/dev")
  libraries = tuple(os.path.realpath(path) for path in others)
  strange = [
      path for path in map(os.path.realpath, opened)
      if not path.startswith((own, *libraries)) and not path.endswith((".py", ".pyc"))
  ]
  assert not strange


@st.composite
def _damaged(draw, content: bytes) -> bytes:
  """Draws the content with bytes changed, cut, repeated or put in."""
  changed = bytearray(content)
  for _ in range(draw(st.integers(1, 4))):
    place = draw(st.integers(0, len(changed)))
    kind = draw(st.sampled_from(["flip", "cut", "insert", "repeat"]))
    if kind == "flip" and place < len(changed):
      changed[place] ^= 1 << draw(st.integers(0, 7))
    elif kind == "cut":
      del changed[place : place + draw(st.integers(0, 40))]
    elif kind == "insert":
      changed[place:place] = draw(st.binary(max_size=12))
    else:
      changed[place:place] = changed[max(0, place - 30) : place]
  return bytes(changed)


def _replaced(draw, value):
  """Draws a JSON value with one thing in it replaced by anything, or removed."""
  if isinstance(value, dict) and value and draw(st.integers(0, 5)):
    key = draw(st.sampled_from(sorted(value)))
    if not draw(st.integers(0, 6)):
      return {k: v for k, v in value.items() if k != key}
    return {**value, key: _replaced(draw, value[key])}
  if isinstance(value, list) and value and draw(st.integers(0, 3)):
    place = draw(st.integers(0, len(value) - 1))
    return [*value[:place], _replaced(draw, value[place]), *value[place + 1 :]]
  return draw(VALUES)


def _changed(draw, content):
  """Draws a JSON file's content, damaged or with one of its values replaced."""
  if draw(st.booleans()):
    return draw(_damaged(content))
  return json.dumps(_replaced(draw, json.loads(content))).encode()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
  """A folder with a small corpus, and its text beside it."""
  folder = tmp_path_factory.mktemp("fuzz")
  run(write_corpus(folder / "text"), folder / "out", "--heldout-every", "4", "--deduplicate")
  return folder / "out"


def _read_all(folder) -> int:
  opened = Corpus(folder)
  stores = [*opened.train.parts.values(), opened.heldout]
  return sum(len(store.row(index, 64)["tokens"]) for store in stores
             for index in range(min(store.num_windows(64), 3)))


PACKED = {
    ".jsonl": lambda content: content, ".jsonl.gz": gzip.compress,
    ".jsonl.zst": zstandard.compress, ".txt": lambda content: content,
}


@pytest.mark.parametrize("suffix", [*PACKED])
@fuzz
@given(data=st.data())
def test_texts(tmp_path, suffix, data):
  content = lines(DOCUMENTS[:12])
  content = data.draw(st.one_of(_damaged(PACKED[suffix](content)), st.binary(max_size=300),
                                _damaged(content).map(PACKED[suffix])))
  file = tmp_path / f"text{suffix}"
  file.write_bytes(content)
  bad = []
  with _opens_only(tmp_path), contextlib.suppress(InputError):
    for *_, text in read_documents(file, "--input", Reading(), lambda *line: bad.append(line)):
      text.encode()
  assert all(place[1:].isdecimal() and why for place, why in bad)
  with _opens_only(tmp_path), contextlib.suppress(InputError):
    for _, text in read_texts(file, "config.data.path"):
      text.encode()


@fuzz
@given(data=st.data())
def test_lines_of_anything(tmp_path, data):
  """Lines that are JSON, but not what is expected: of documents, of parts, of examples."""
  start = {"text": "a", "meta": {"pile_set_name": "Books3"}, "prompt": "a", "response": "b",
           "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
  found = [_replaced(data.draw, start) for _ in range(4)]
  file = tmp_path / "lines.jsonl"
  file.write_text("".join(json.dumps(value) + "\n" for value in found))
  bad = []
  reading = Reading("text", "meta.pile_set_name")
  kept = [*read_documents(file, "--input", reading, lambda *line: bad.append(line))]
  assert len(kept) + len(bad) == 4
  with contextlib.suppress(InputError):
    [*read_examples(file, "config.data.path", NAMED["chatml"])]


@fuzz
@given(data=st.data())
def test_manifests(corpus, data):
  """With a right check, so that values are what is tried; and damaged bytes."""
  file = corpus / manifests.MANIFEST
  content = file.read_bytes()
  if data.draw(st.booleans()):
    changed = data.draw(_damaged(content))
  else:
    values = json.loads(content)
    del values["check"]
    values = _replaced(data.draw, values)
    check = {"check": manifests._check(values)} if isinstance(values, dict) else None
    changed = json.dumps(values | check if check else values).encode()
  file.write_bytes(changed)
  try:
    with _opens_only(corpus), contextlib.suppress(InputError):
      assert _read_all(corpus)
  finally:
    file.write_bytes(content)


@fuzz
@given(data=st.data())
def test_indexes(corpus, data):
  shard = data.draw(st.sampled_from(manifests.read_manifest(corpus).shards))
  file = corpus / "shards" / f"{shard.name}.index"
  content = file.read_bytes()
  changed = data.draw(_damaged(content))
  file.write_bytes(changed)
  try:
    with contextlib.suppress(InputError):
      index = read_index(corpus / "shards", shard)
      assert index.sum(0).tolist() == [shard.tokens, shard.text_bytes]
  finally:
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["shards", "starts", "tokenizer"])
@fuzz
@given(data=st.data())
def test_files_of_a_corpus(corpus, name, data):
  """Damaged bytes are found, or the ids are the right ones."""
  expected = _read_all(corpus)
  files = sorted(file for file in (corpus / name).iterdir() if file.suffix != ".index")
  file = data.draw(st.sampled_from(files))
  content = file.read_bytes()
  file.write_bytes(data.draw(_damaged(content)))
  try:
    with _opens_only(corpus), contextlib.suppress(InputError):
      assert _read_all(corpus) == expected
  finally:
    file.write_bytes(content)


@fuzz
@given(data=st.data())
def test_results_of_files(corpus, data):
  file = Input(0, str(corpus.parent / "text/a.jsonl"), "a.jsonl", False)
  chosen = Settings(Reading(), 4, True)
  result = corpus / "files/000000.json"
  content = result.read_bytes()
  assert finished(corpus, file, chosen) is not None
  result.write_bytes(_changed(data.draw, content))
  try:
    with _opens_only(corpus.parent), contextlib.suppress(InputError):
      finished(corpus, file, chosen)
  finally:
    result.write_bytes(content)


@fuzz
@given(data=st.data())
def test_jobs_that_go_on(corpus, data):
  """A damaged job.json: the job is refused, or is the same."""
  job = corpus / "job.json"
  content = job.read_bytes()
  job.write_bytes(_changed(data.draw, content))
  try:
    with contextlib.suppress(InputError):
      run(corpus.parent / "text", corpus, "--heldout-every", "4", "--deduplicate")
  finally:
    job.write_bytes(content)


@fuzz
@given(text=st.text(max_size=40) | st.from_regex(r"[a-c=,;:0-9. ]{0,30}", fullmatch=True))
def test_mixtures(text):
  with contextlib.suppress(InputError):
    for mixture in parse_mixtures(text):
      assert mixture.shares and all(share > 0 for share in mixture.shares.values())


@fuzz
@given(data=st.data())
def test_tokenized_folders(tmp_path, data):
  """`tokenized.json` of `dense-jax tokenize`, and the lengths of its arrays."""
  from dense_jax.data import identity, pipeline, prepared

  folder = tmp_path / "made"
  if not folder.is_dir():
    (tmp_path / "a.jsonl").write_bytes(lines(DOCUMENTS[:30]))
    config = DataConfig(path=str(tmp_path / "a.jsonl"), tokenizer="bytes",
                        cache_dir=str(tmp_path / "cache"))
    found = pipeline.load_datasets(config)
    prepared.write(folder, config, found.tokenizer, found.train, found.heldout,
                   identity.describe(found))
  names = ["tokenized.json", "train/meta.json", "heldout/meta.json",
           "tokenizer/tokenizer_config.json"]
  file = folder / data.draw(st.sampled_from(names))
  content = file.read_bytes()
  file.write_bytes(_changed(data.draw, content))
  try:
    with _opens_only(tmp_path), contextlib.suppress(InputError):
      opened = prepared.read(DataConfig(path=str(folder)))
      assert isinstance(opened.train.row(0, 16)["tokens"], np.ndarray)
  finally:
    file.write_bytes(content)


def test_a_shard_outside_of_the_folder_is_refused(corpus, tmp_path):
  copied = tmp_path / "out"
  shutil.copytree(corpus, copied)
  file = copied / manifests.MANIFEST
  content = file.read_text()
  first = manifests.read_manifest(copied).shards[0]
  for name in ("../shards/x", "/etc/passwd", "a/b", "..", f"../{first.name}"):
    values = json.loads(content.replace(f'"{first.name}"', json.dumps(name)))
    del values["check"]
    file.write_text(json.dumps({"check": manifests._check(values), **values}))
    with pytest.raises(InputError, match="is no shard's name"):
      Corpus(copied)

"""A corpus in shards: documents in order, what is left out, and training's view of it."""

import contextlib
import dataclasses
import json
import shutil
import sys

import numpy as np
import pytest

from dense_jax.config import DataConfig
from dense_jax.data import identity, pipeline, prepared
from dense_jax.data.corpus.manifest import read_manifest
from dense_jax.data.corpus.opening import Corpus
from dense_jax.data.corpus.shards import BLOCK
from dense_jax.errors import InputError
from tests.data.corpus.texts import DOCUMENTS, NAMES, files_of, lines, run, write_corpus

T = 32


def _texts(corpus):
  return {
      name: [*part.texts(corpus.tokenizer.decode)]
      for name, part in {**corpus.train.parts, "heldout": corpus.heldout}.items()
  }


def test_all_documents_are_there_in_order(tmp_path, capsys):
  text = write_corpus(tmp_path / "text")
  assert not run(text, tmp_path / "out", "--heldout-every", "4")
  printed = capsys.readouterr().out
  assert "MB/s by 1 workers" in printed and "3 files, 0 lines passed over" in printed
  corpus = Corpus(tmp_path / "out")
  found = _texts(corpus)
  held = {*found["heldout"]}
  assert 10 < len(held) < 60
  assert found["text"] == [document for document in DOCUMENTS if document not in held]
  assert found["heldout"] == [document for document in DOCUMENTS if document in held]
  store = corpus.train.parts["text"]
  ids = corpus.tokenizer.encode(found["text"][1])
  begin = int(store.starts[1])
  assert store.tokens[begin : begin + len(ids) + 2].tolist() == [256, *ids, 257]
  assert store.num_bytes == sum(len(document.encode()) for document in found["text"])
  manifest = read_manifest(tmp_path / "out")
  assert [source.name for source in manifest.sources] == ["a.jsonl", "b.jsonl.gz", "c.jsonl.zst"]
  # Equal texts are on the same side, whatever files they are in.
  shutil.rmtree(text)
  text.mkdir()
  (text / "x.jsonl").write_bytes(lines(DOCUMENTS[::-1]))
  run(text, tmp_path / "other", "--heldout-every", "4")
  assert {*_texts(Corpus(tmp_path / "other"))["heldout"]} == held


def test_slices_across_blocks_and_shards(tmp_path):
  text = tmp_path / "text"
  text.mkdir()
  sizes = [BLOCK - 2, 1, BLOCK * 2, 3 * BLOCK + 5, 10]
  for number, size in enumerate(sizes):
    (text / f"{number}.txt").write_text(chr(97 + number) * size)
  (tmp_path / "held.txt").write_text("held out")
  run(text, tmp_path / "out", "--heldout", str(tmp_path / "held.txt"))
  corpus = Corpus(tmp_path / "out")
  assert _texts(corpus)["heldout"] == ["held out"]
  store = corpus.train.parts["text"]
  whole = np.concatenate([[256, *[97 + number] * size, 257] for number, size in enumerate(sizes)])
  assert len(store.tokens) == len(whole) and store.tokens.dtype == np.dtype("<u2")
  random = np.random.default_rng(0)
  places = [(0, len(whole)), (0, 0), (BLOCK - 1, BLOCK + 1), (len(whole) - 1, len(whole))]
  places += [tuple(sorted(random.integers(0, len(whole) + 1, 2))) for _ in range(50)]
  for low, high in places:
    np.testing.assert_array_equal(store.tokens[low:high], whole[low:high])


def test_a_run_reads_the_corpus_as_it_reads_text(tmp_path):
  """One part in one stream has the rows that the text itself has."""
  text = tmp_path / "text.jsonl"
  text.write_bytes(lines(DOCUMENTS[8:]))
  (tmp_path / "held.jsonl").write_bytes(lines(DOCUMENTS[:8]))
  run(text, tmp_path / "out", "--heldout", str(tmp_path / "held.jsonl"), tokenizer="train:300")
  config = DataConfig(path=str(tmp_path / "out"), seq_len=T, cache_dir=str(tmp_path / "cache"))
  data = pipeline.load_datasets(config)
  assert data.tokenizer.vocab_size == prepared.vocab_size(config) == 300
  assert data.description == identity.describe(data)
  of_text = pipeline.load_datasets(dataclasses.replace(
      config, path=str(text), heldout_path=str(tmp_path / "held.jsonl"),
      tokenizer=str(tmp_path / "out/tokenizer"),
  ))
  for part in ("train", "heldout"):
    one, other = getattr(data, part), getattr(of_text, part)
    assert (one.num_bytes, one.num_targets) == (other.num_bytes, other.num_targets)
    assert one.num_windows(T) == other.num_windows(T)
    for index in range(one.num_windows(T)):
      for name, values in other.row(index, T).items():
        np.testing.assert_array_equal(one.row(index, T)[name], values)
  assert [[*texts] for texts in pipeline.texts(config, data.tokenizer)] == [
      DOCUMENTS[8:], DOCUMENTS[:8]]
  before = data.description | {"texts": ["other"], "fingerprint": "other"}
  (line,) = identity.explain_difference(before, identity.describe(data))
  assert "another part" in line


def test_parts_by_a_field(tmp_path):
  text = write_corpus(tmp_path / "text")
  field = ("--part-field", "meta.pile_set_name", "--heldout-every", "4")
  run(text, tmp_path / "own", *field)
  assert {*Corpus(tmp_path / "own").train.parts} == {*NAMES}
  (tmp_path / "parts.json").write_text('{"Pile-CC": "web", "*": "rest"}')
  run(text, tmp_path / "out", *field, "--parts", str(tmp_path / "parts.json"))
  corpus = Corpus(tmp_path / "out")
  found = _texts(corpus)
  held = {*found["heldout"]}
  for name, remainders in (("web", (0,)), ("rest", (1, 2))):
    assert found[name] == [
        document for number, document in enumerate(DOCUMENTS)
        if number % 3 in remainders and document not in held
    ]
  (tmp_path / "parts.json").write_text('{"Pile-CC": "web"}')
  with pytest.raises(InputError, match="more than 5 lines are no documents; the last of them is "
                     r"a\.jsonl:9: meta\.pile_set_name = 'Github' belongs to no part"):
    run(text, tmp_path / "few", *field, "--parts", str(tmp_path / "parts.json"),
        "--most-bad", "5")


def test_values_that_come_to_one_name_are_refused(tmp_path):
  text = tmp_path / "text"
  text.mkdir()

  def write(name, language):
    content = [{"text": f"{language} {n}", "language": language} for n in range(20)]
    (text / name).write_text("".join(json.dumps(line) + "\n" for line in content))

  options = ["--part-field", "language", "--heldout-every", "4"]
  message = r"^--part-field: the values 'C' and 'C\+\+' .* part 'C'\. Expected --parts FILE\.json"
  write("a.jsonl", "C")
  write("b.jsonl", "D")
  run(text, tmp_path / "out", *options)
  # The job goes on with the second file; the first is done.
  (tmp_path / "out/manifest.json").unlink()
  (tmp_path / "out/files/000001.json").unlink()
  write("b.jsonl", "C++")
  for folder in ("out", "new"):
    with pytest.raises(InputError, match=message):
      run(text, tmp_path / folder, *options)
  (tmp_path / "parts.json").write_text('{"C": "c", "*": "other"}')
  run(text, tmp_path / "named", *options, "--parts", str(tmp_path / "parts.json"))
  assert {*Corpus(tmp_path / "named").train.parts} == {"c", "other"}


def test_bad_lines_are_counted_and_named(tmp_path, caplog):
  text = tmp_path / "text"
  text.mkdir()
  bad = [b"{", b'{"text": 5}', b"[]", b'{"txt": "a"}', b"\xff\xfe", b'{"text": ""}', b"", b"  "]
  (text / "a.jsonl").write_bytes(b"\n".join([*lines(DOCUMENTS[:20]).splitlines(), *bad]) + b"\n")
  run(text, tmp_path / "out", "--heldout-every", "2")
  (source,) = read_manifest(tmp_path / "out").sources
  assert (source.documents, source.bad, source.empty, source.duplicates) == (20, 5, 1, 0)
  assert "a.jsonl:21 is passed over: Expecting property name" in caplog.text
  assert "a.jsonl:22 is passed over: it has no string 'text'" in caplog.text
  with pytest.raises(InputError, match=r"more than 4 lines .* a\.jsonl:25: byte 1 is not UTF-8"):
    run(text, tmp_path / "again", "--heldout-every", "2", "--most-bad", "4")


def test_duplicates_are_left_out_in_all_files(tmp_path):
  text = write_corpus(tmp_path / "text")
  (text / "d.jsonl").write_bytes(lines([*DOCUMENTS[30:50], "new", "new"]))
  run(text, tmp_path / "out", "--deduplicate", "--heldout-every", "4")
  sources = read_manifest(tmp_path / "out").sources
  assert [(source.documents, source.duplicates) for source in sources] == [
      (40, 0), (40, 0), (40, 0), (1, 21)]
  found = _texts(Corpus(tmp_path / "out"))
  assert sorted([*found["text"], *found["heldout"]]) == sorted([*DOCUMENTS, "new"])
  # A held-out file is read first, and what it has is not trained on.
  (tmp_path / "held.jsonl").write_bytes(lines(DOCUMENTS[5:9]))
  run(text, tmp_path / "held", "--deduplicate", "--heldout", str(tmp_path / "held.jsonl"))
  found = _texts(Corpus(tmp_path / "held"))
  assert found["heldout"] == DOCUMENTS[5:9] and not {*found["text"]} & {*DOCUMENTS[5:9]}


def test_parquet(tmp_path):
  pyarrow = pytest.importorskip("pyarrow")
  parquet = pytest.importorskip("pyarrow.parquet")
  rows = [{"content": text, "meta": {"set": "web"}} for text in DOCUMENTS]
  rows[3]["content"] = None
  parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
  run(tmp_path / "a.parquet", tmp_path / "out", "--column", "content", "--part-field", "meta.set",
      "--heldout-every", "4")
  corpus = Corpus(tmp_path / "out")
  assert corpus.manifest.sources[0].bad == 1
  found = _texts(corpus)
  assert {*found["web"], *found["heldout"]} == {*DOCUMENTS[:3], *DOCUMENTS[4:]}
  (tmp_path / "b.parquet").write_bytes(b"PAR1 no table PAR1")
  with pytest.raises(InputError, match=r"^--input = .*b\.parquet"):
    run(tmp_path / "b.parquet", tmp_path / "other")


def test_a_bad_row_of_parquet_is_a_row(tmp_path):
  pyarrow = pytest.importorskip("pyarrow")
  parquet = pytest.importorskip("pyarrow.parquet")
  texts = [b"no utf-8 \xff" if number == 5 else text.encode()
           for number, text in enumerate(DOCUMENTS)]
  binary = pyarrow.array(texts, pyarrow.binary())
  text = pyarrow.Array.from_buffers(pyarrow.string(), len(binary), binary.buffers())
  # A year that Python does not have, beside what says the part.
  when = pyarrow.array([2**60] * len(texts), pyarrow.timestamp("ms"))
  part = pyarrow.array(["web"] * len(texts))
  meta = pyarrow.StructArray.from_arrays([part, when], ["set", "when"])
  parquet.write_table(pyarrow.table({"text": text, "meta": meta}), tmp_path / "a.parquet")
  run(tmp_path / "a.parquet", tmp_path / "out", "--part-field", "meta.set", "--heldout-every", "4")
  corpus = Corpus(tmp_path / "out")
  assert corpus.manifest.sources[0].bad == 1
  found = _texts(corpus)
  assert {*found["web"], *found["heldout"]} == {*DOCUMENTS[:5], *DOCUMENTS[6:]}


def test_parquet_without_its_package_names_the_extra(tmp_path, monkeypatch):
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  (tmp_path / "a.parquet").write_bytes(b"")
  with pytest.raises(InputError, match=r"pip install -e '\.\[parquet\]'"):
    run(tmp_path / "a.parquet", tmp_path / "out")


def test_held_out_files_are_known_by_any_name(tmp_path):
  text = write_corpus(tmp_path / "text")
  (tmp_path / "held.jsonl").symlink_to(text / "a.jsonl")
  with pytest.raises(InputError, match=r"^--heldout = .* not in --input as well"):
    run(text, tmp_path / "out", "--heldout", str(tmp_path / "held.jsonl"))


@pytest.mark.parametrize("options, message", [
    (["--heldout-every", "1"], r"^--heldout-every = 1 .* >= 2"),
    (["--heldout-every", "100000"], r"^--heldout-every = 100000 .*no document was held out"),
    (["--heldout", "TEXT/a.jsonl"], r"^--heldout = .* not in --input as well, as .*a\.jsonl"),
    (["--part-field", "meta.none"], r"it has no string 'meta\.none'"),
    (["--parts", "TEXT/parts.json"], r"--parts = .*nothing without --part-field"),
    (["--heldout", "TEXT/../empty.txt"], r"^--heldout = .* files with text"),
    (["--tokenizer", "train:x"], r"^--tokenizer = 'train:x' .*number of pieces"),
    (["--tokenizer", f"train:{10**11}"], r"^--tokenizer = .*number of pieces"),
    (["--tokenizer", "train:100"], r"^--tokenizer = 100 is not valid: expected an integer >= "),
    (["--tokenizer", "train"], r"^--tokenizer = 'train' .*train:N"),
    (["--beam=--runner='Direct"], r"^--beam = .*No closing quotation"),
    (["--tokenizer", "TEXT/none"], r"^--tokenizer = .*expected train:N, \"bytes\", the path"),
    (["--tokenizer", "TEXT"], r"^--tokenizer = .*no tokenizer in"),
    (["--parts", "TEXT/none.json"], r"^--parts = .*cannot be read: No such file"),
    (["--output", "TEXT/a.jsonl"], r"^--output = '[^']*/a\.jsonl' .*a file is where a folder"),
])
def test_options_that_are_not_valid(tmp_path, options, message):
  text = write_corpus(tmp_path / "text")
  (text / "parts.json").write_text('{"a": "b"}')
  (tmp_path / "empty.txt").write_text("")
  options = [option.replace("TEXT", str(text)) for option in options]
  with pytest.raises(InputError, match=message):
    run(text, tmp_path / "out", "--most-bad", "10", *options)


@pytest.mark.parametrize("mistake, begins", [("nobody.model", False), ("train:100", True)])
def test_a_tokenizer_that_is_not_valid_leaves_no_job(tmp_path, mistake, begins):
  """The command is given again with another one; whether training works is known late."""
  text = write_corpus(tmp_path / "text")
  with pytest.raises(InputError, match=r"^--tokenizer"):
    run(text, tmp_path / "out", tokenizer=mistake)
  assert (tmp_path / "out").exists() == begins
  run(text, tmp_path / "out")
  run(text, tmp_path / "fresh")
  assert files_of(tmp_path / "out") == files_of(tmp_path / "fresh")


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete", "zeros"])
def test_damage_is_named(tmp_path, damage):
  """Of every file that training reads; a flip in a text's ids is found when they are read."""
  text = write_corpus(tmp_path / "text")
  run(text, tmp_path / "out", "--heldout-every", "4", tokenizer="train:300")
  files = [file for file in files_of(tmp_path / "out") if not file.startswith(("job", "files"))
           and not file.endswith(".index") and "config" not in file]
  assert len(files) >= 10
  for name in files:
    file = tmp_path / "out" / name
    content = file.read_bytes()
    changed = {
        "truncate": content[: len(content) // 2], "zeros": bytes(len(content)), "delete": b"",
        "flip": content[: len(content) // 2] + bytes([content[len(content) // 2] ^ 16])
        + content[len(content) // 2 + 1 :],
    }[damage]
    file.write_bytes(changed)
    if damage == "delete":
      file.unlink()
    with contextlib.suppress(InputError):
      corpus = Corpus(tmp_path / "out")
      for part in (*corpus.train.parts.values(), corpus.heldout):
        for index in range(part.num_windows(T)):
          part.row(index, T)
      raise AssertionError(f"{damage} of {name} was not found")
    file.write_bytes(content)
  Corpus(tmp_path / "out")


def test_an_unfinished_corpus_is_not_trained_on(tmp_path):
  text = write_corpus(tmp_path / "text")
  run(text, tmp_path / "out", "--heldout-every", "4")
  manifest = tmp_path / "out/manifest.json"
  values = json.loads(manifest.read_text())
  manifest.unlink()
  config = DataConfig(path=str(tmp_path / "out"))
  with pytest.raises(InputError, match=r"^config\.data\.path = .* expected a finished corpus"):
    pipeline.load_datasets(config)
  manifest.write_text(json.dumps(values | {"format": 2}))
  with pytest.raises(InputError, match="format = 2 is not valid: expected 1"):
    pipeline.load_datasets(config)


def test_beam(tmp_path):
  pytest.importorskip("apache_beam")
  text = write_corpus(tmp_path / "text")
  run(text, tmp_path / "whole", "--heldout-every", "4")
  run(text, tmp_path / "out", "--heldout-every", "4", "--beam=--runner=DirectRunner")
  assert files_of(tmp_path / "whole") == files_of(tmp_path / "out")
  with pytest.raises(InputError, match=r"^--deduplicate = True .*nothing with --beam"):
    run(text, tmp_path / "other", "--deduplicate", "--beam=--runner=DirectRunner")


def test_beam_without_its_package_names_the_extra(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "apache_beam", None)
  with pytest.raises(InputError, match=r"pip install -e '\.\[beam\]'"):
    run(write_corpus(tmp_path / "text"), tmp_path / "out", "--beam=--runner=DirectRunner")

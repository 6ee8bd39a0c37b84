"""Examples to fine-tune on: reading, refusals, tokens and masks through packing, and the loss."""

import gzip
import json
import logging

import jax
import numpy as np
import pytest
import zstandard

from dense_jax.config import DataConfig
from dense_jax.data import packing, pipeline, sources
from dense_jax.data.batches import heldout_batches
from dense_jax.data.templates import NAMED, parse_template
from dense_jax.data.tokenizer import ByteTokenizer
from dense_jax.errors import InputError
from dense_jax.evaluation.perplexity import HeldOut
from tests.builders import VOCAB, fast_jit, model_config, random_model

BOS, EOS = ByteTokenizer.bos_id, ByteTokenizer.eos_id
TEMPLATE = parse_template("<{prompt}>")


def _lines(*values) -> bytes:
  return b"".join(json.dumps(value).encode() + b"\n" for value in values)


def _message(role, content):
  return {"role": role, "content": content}


TWO = _lines(
    {"prompt": "ab", "response": "é"},
    {"prompt": "not this", "id": 3, "messages": [
        _message("user", "c"), _message("assistant", "de"), _message("user", ""),
        _message("assistant", "f")]},
)


def _source(tmp_path, content, name="a.jsonl", template=TEMPLATE) -> sources.TextSource:
  (tmp_path / name).write_bytes(content)
  return sources.find(str(tmp_path / name), "config.data.path", template=template)


def _store(tmp_path, content, template=TEMPLATE) -> packing.TokenStore:
  source = _source(tmp_path, content, template=template)
  return packing.build_store(source, ByteTokenizer(), str(tmp_path / "cache"))


@pytest.mark.parametrize(("suffix", "pack"), [
    ("", bytes), (".gz", gzip.compress), (".zst", zstandard.compress),
])
def test_examples_are_read_in_every_packing(tmp_path, suffix, pack):
  documents = list(_source(tmp_path, pack(b"\n" + TWO), f"a.jsonl{suffix}"))
  assert [document.name[-2:] for document in documents] == [":2", ":3"]
  assert documents[0].turns == (("<ab>", "é"),)
  assert documents[1].turns == (("<c>", "de"), ("<>", "f"))
  assert [document.text for document in documents] == ["<ab>é", "<c>de<>f"]
  assert [document.target_text for document in documents] == ["é", "def"]


@pytest.mark.parametrize(("value", "why"), [
    ({"prompt": "a"}, 'it has no "response"'), ({"response": "a"}, 'it has no "prompt"'),
    ({"text": "a"}, 'it has no "prompt"'), ([], "it is no object"), ("a", "it is no object"),
    ({"prompt": 3, "response": "a"}, 'its "prompt" is no string'),
    ({"prompt": "a", "response": None}, 'its "response" is no string'),
    ({"prompt": "a", "response": ""}, 'its "response" is empty'),
    ({"messages": []}, "no list of messages"), ({"messages": {}}, "no list of messages"),
    ({"messages": ["hi"]}, "message 1: it is no object"),
    ({"messages": [_message("user", "a"), {"role": "user"}]}, 'message 2: it has no "content"'),
    ({"messages": [_message("bot", "a")]}, "message 1: unknown role 'bot'"),
    ({"messages": [_message("assistant", "")]}, "message 1: the assistant's content is empty"),
    ({"messages": [_message("user", [{"type": "text"}])]}, '"content" is no string'),
    ({"messages": [_message("assistant", "a"), _message("user", "b")]}, "the last message is of"),
])
def test_a_line_that_is_no_example_is_named(tmp_path, value, why):
  source = _source(tmp_path, TWO + _lines(value))
  with pytest.raises(InputError) as error:
    list(source)
  message = str(error.value)
  assert message.startswith("config.data.path = ") and "a.jsonl" in message
  assert 'expected a JSON object with strings "prompt" and "response", or with "mess' in message
  assert "in every line; line 3 is b'" in message and why in message


def test_json_that_is_none_and_other_files_are_named(tmp_path):
  with pytest.raises(InputError, match=r"line 3 is b'\{\"prompt'.*\(Unterminated string"):
    list(_source(tmp_path, TWO + b'{"prompt'))
  (tmp_path / "folder").mkdir()
  for name in ("b.txt", "folder/c.txt"):
    (tmp_path / name).write_text("text")
    with pytest.raises(InputError, match=rf"{name[-5:]}' is not valid: expected \.jsonl, "):
      sources.find(str((tmp_path / name).parent if "/" in name else tmp_path / name), "f",
                   template=TEMPLATE)
  with pytest.raises(InputError, match=r"\.py' is not valid: expected \.jsonl"):
    sources.find("stdlib", "config.data.path", template=TEMPLATE)


def test_messages_need_a_template_that_says_who_speaks(tmp_path):
  plain = NAMED["plain"]
  with pytest.raises(InputError, match=r"line 2 .*dialogue, instruction, chatml, or a text with"):
    list(_source(tmp_path, TWO, template=plain))


def test_tokens_and_targets_of_two_examples(tmp_path):
  store = _store(tmp_path, TWO)
  a, b, c, d, e, f = b"abcdef"
  open_, close = b"<>"
  first = [BOS, open_, a, b, close, 0xC3, 0xA9, EOS]
  second = [BOS, open_, c, close, d, e, EOS, open_, close, f, EOS]
  np.testing.assert_array_equal(store.tokens, first + second)
  np.testing.assert_array_equal(store.starts, [0, 8])
  np.testing.assert_array_equal(store.responses, [[5, 8], [12, 15], [17, 19]])
  # Of the responses' bytes: é has two, "de" and "f" three.
  np.testing.assert_array_equal(store.document_bytes, [2, 3])
  assert (store.num_bytes, store.num_targets, store.targets_per_byte) == (5, 8, 8 / 5)
  assert store.prompt(0, 2) == [open_, a, b, close] and store.prompt(1, 2) == [open_, c, close]

  # One window of 18 inputs holds both.
  row = store.row(0, 18)
  assert store.num_windows(18) == 1
  np.testing.assert_array_equal(row["tokens"], (first + second)[:-1])
  np.testing.assert_array_equal(row["targets"], (first + second)[1:])
  np.testing.assert_array_equal(
      row["loss_mask"], [0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 0, 0, 1, 1])
  np.testing.assert_array_equal(row["segment_ids"], [1] * 8 + [2] * 10)
  np.testing.assert_array_equal(row["positions"], [*range(8), *range(10)])

  # Of 12 inputs, each holds one, padded: none is cut.
  assert store.num_windows(12) == 2 and store.num_cut(12) == 0
  rows = [store.row(index, 12) for index in range(2)]
  np.testing.assert_array_equal(rows[0]["tokens"], [*first[:-1], *[0] * 5])
  np.testing.assert_array_equal(rows[0]["loss_mask"], [0, 0, 0, 0, 1, 1, 1] + [0] * 5)
  np.testing.assert_array_equal(rows[0]["segment_ids"], [1] * 7 + [0] * 5)
  np.testing.assert_array_equal(rows[1]["tokens"], [*second[:-1], 0, 0])
  np.testing.assert_array_equal(rows[1]["targets"], [*second[1:], 0, 0])
  np.testing.assert_array_equal(rows[1]["loss_mask"], [0, 0, 0, 1, 1, 1, 0, 0, 1, 1, 0, 0])

  # Of 3 inputs, examples are cut; windows without a target are left out: [BOS < a b] is one.
  rows = [store.row(index, 3) for index in range(store.num_windows(3))]
  assert store.num_cut(3) == 2
  assert [row["tokens"].tolist() for row in rows] == [
      [b, close, 0xC3], [0xA9, 0, 0], [close, d, e], [EOS, open_, close], [f, 0, 0]]
  assert [row["targets"][row["loss_mask"]].tolist() for row in rows] == [
      [0xC3, 0xA9], [EOS], [d, e, EOS], [f], [EOS]]
  assert all(row["segment_ids"][0] == 1 and row["positions"][0] == 0 for row in rows)
  with pytest.raises(IndexError, match="window 5 of 5"):
    store.row(5, 3)


@pytest.mark.parametrize("seq_len", [1, 2, 5, 16, 40, 1000])
def test_every_target_is_in_one_window_and_examples_stay_whole(tmp_path, seq_len):
  rng = np.random.default_rng(0)
  examples = [{"prompt": "p" * rng.integers(0, 30), "response": chr(97 + n % 26) * (1 + n % 11)}
              for n in range(120)]
  store = _store(tmp_path, _lines(*examples))
  seen = np.zeros(store.num_tokens, int)
  for index in range(store.num_windows(seq_len)):
    low, high = store.window(index, seq_len)
    row = store.row(index, seq_len)
    assert row["loss_mask"].any() and 2 <= high - low <= seq_len + 1
    seen[low + 1 + np.flatnonzero(row["loss_mask"])] += 1
    for start, end in zip(store.starts, [*store.starts[1:], store.num_tokens], strict=True):
      if end - start <= seq_len + 1:  # It fits, so it is inside as a whole or not at all.
        assert (low <= start and end <= high) or end <= low + 1 or start >= high
  expected = np.zeros(store.num_tokens, int)
  for begin, end in store.responses:
    expected[begin:end] = 1
  np.testing.assert_array_equal(seen, expected)
  assert seen.sum() == store.num_targets == sum(len(e["response"]) + 1 for e in examples)
  batches = heldout_batches(store, seq_len, 4)
  assert sum(batch.loss_mask_BT.sum() for batch in batches) == store.num_targets


def test_a_damaged_store_is_made_again(tmp_path):
  store = _store(tmp_path, TWO)
  (tmp_path / "cache" / "tokens" / store.fingerprint / "responses.bin").unlink()
  np.testing.assert_array_equal(_store(tmp_path, TWO).responses, [[5, 8], [12, 15], [17, 19]])


def test_the_template_is_part_of_the_datas_identity(tmp_path):
  sourced = [_source(tmp_path, _lines({"text": "a", "prompt": "a", "response": "b"}), template=t)
             for t in (None, *NAMED.values(), TEMPLATE, parse_template("<{prompt}> "))]
  assert len({source.fingerprint for source in sourced}) == len(sourced)


def test_load_datasets_holds_out_examples_and_says_what_is_cut(tmp_path, caplog):
  examples = [{"prompt": f"{n}", "response": "x" * (50 if n == 4 else 1)} for n in range(9)]
  (tmp_path / "a.jsonl").write_bytes(_lines(*examples))
  values = {"path": str(tmp_path / "a.jsonl"), "tokenizer": "bytes", "seq_len": 32,
            "format": "responses", "template": "Q: {prompt} A:", "heldout_every": 4,
            "cache_dir": str(tmp_path / "cache")}
  with caplog.at_level(logging.WARNING):
    data = pipeline.load_datasets(DataConfig(**values))
  assert [d.turns[0].prompt for d in data.sources[1]] == ["Q: 0 A:", "Q: 4 A:", "Q: 8 A:"]
  assert data.train.num_documents == 6 and data.train.num_bytes == 6
  assert "config.data.seq_len = 32: of 9 examples 1 are longer" in caplog.text
  with pytest.raises(InputError, match=r"^config\.data\.heldout_every = 10 .* <= .*, 9; or other"):
    pipeline.load_datasets(DataConfig(**values | {"heldout_every": 10}))
  with pytest.raises(InputError, match=r"^config\.data\.template = '\{x\}'"):
    pipeline.load_datasets(DataConfig(**values | {"template": "{x}"}))
  (tmp_path / "b.jsonl").write_bytes(_lines({"prompt": "a", "response": "b"}))
  held = pipeline.load_datasets(DataConfig(**values | {
      "heldout_every": 10, "heldout_path": str(tmp_path / "b.jsonl")}))
  assert held.train.num_documents == 9 and held.heldout.num_targets == 2


def test_the_loss_of_a_packed_batch_is_that_of_its_responses_summed_by_hand():
  """Each example alone, each response token's -log p from the logits, against packed rows."""
  rng = np.random.default_rng(3)
  lengths = [(4, 3), (1, 5), (6, 2), (2, 2)]  # Tokens of prompt and response, without eos.
  rows, spans, place = [], [], 0
  for prompt, response in lengths:
    row = rng.integers(2, VOCAB, 2 + prompt + response)
    row[0], row[-1] = 0, 1
    spans.append((place + 1 + prompt, place + len(row)))
    rows.append(row)
    place += len(row)
  store = packing.TokenStore(
      tokens=np.concatenate(rows).astype(np.uint16), starts=np.cumsum([0, *map(len, rows[:-1])]),
      document_bytes=np.array([2 * response for _, response in lengths]), fingerprint="x",
      responses=np.array(spans),
  )
  model = random_model(model_config("mamba", layers=2))
  # Padding on the right changes nothing before it.
  alone = np.zeros((len(rows), 9), np.int32)
  for index, row in enumerate(rows):
    alone[index, : len(row) - 1] = row[:-1]
  log_p = fast_jit(lambda model, tokens: jax.nn.log_softmax(model(tokens)))(model, alone)
  log_p = np.asarray(log_p)
  expected = 0.0
  for index, (row, (prompt, _)) in enumerate(zip(rows, lengths, strict=True)):
    places = np.arange(prompt, len(row) - 1)
    expected -= float(log_p[index, places, row[places + 1]].sum())

  batch = next(heldout_batches(store, 16, store.num_windows(16)))
  assert batch.tokens_BT.shape == (2, 16) and (batch.segments.ids_BT == 2).any()
  total, nll, _ = fast_jit(
      lambda model, batch: model.summed_losses(batch, z_loss=0.0, chunk=8))(model, batch)
  np.testing.assert_allclose([float(total), float(nll)], expected, rtol=1e-5)
  assert batch.loss_mask_BT.sum() == store.num_targets == 16
  bits = expected / np.log(2) / sum(2 * response for _, response in lengths)
  held_out = HeldOut(float(nll), store.num_targets)
  np.testing.assert_allclose(held_out.bits_per_byte(store.targets_per_byte), bits, rtol=1e-5)

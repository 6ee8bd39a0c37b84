"""`spell`, which decodes a prompt and its continuation, with tokenizers of several styles."""

import io
import json
import random

import pytest
import sentencepiece

from dense_jax.data import tokenizer
from dense_jax.data.converted import converted_files
from dense_jax.data.spelling import prompt_ids, spell
from dense_jax.data.tokenizer import SentencePieceTokenizer, load_saved_tokenizer
from dense_jax.data.tokenizer_training import TRAINER_OPTIONS

TEXT = [
    f"def function_{i}(self, value): the cat sat on number {i}, naïve → \uff21\uff22 \ufb01ne café"
    for i in range(200)
]
T5 = {"model_type": "unigram", "vocab_size": 150, "pad_id": 0, "eos_id": 1, "unk_id": 2,
      "bos_id": -1}
# Training options of well-known models' tokenizers, at small sizes.
STYLES = {
    # Adds a space before the text, falls back to bytes for unknown characters, normalises nothing.
    "llama": {"model_type": "bpe", "vocab_size": 400, "byte_fallback": True,
              "character_coverage": 0.99, "normalization_rule_name": "identity",
              "remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True},
    # The same, but normalises forms of letters and drops repeated spaces.
    "llama, nmt_nfkc": {"model_type": "bpe", "vocab_size": 400, "byte_fallback": True,
                        "character_coverage": 0.99},
    "t5": T5 | {"user_defined_symbols": ["<extra_id_0>", "<extra_id_1>"]},
    "t5, control symbols": T5 | {"control_symbols": ["<extra_id_0>", "<extra_id_1>"]},
    "space as suffix": {"model_type": "unigram", "vocab_size": 150,
                        "treat_whitespace_as_suffix": True},
    "no space before the text": {"model_type": "bpe", "vocab_size": 150,
                                 "add_dummy_prefix": False},
    "words": {"model_type": "word", "vocab_size": 80},
    "our own": TRAINER_OPTIONS | {"vocab_size": 400},
}
INPUTS = [
    "the cat sat", " the cat", "  a  b \n c", "漢字 → 😀 e\u0301 👨‍👩‍👧", "",
    "naïve \uff21\uff22 \ufb01ne café", "<extra_id_0> the", "a\r\nb\tc", "\x1b[31m\x07",
    "▁ mark ▁▁", "<s>x</s>", "number 7, number ",
]


@pytest.fixture(scope="module")
def models():
  """Style -> a tokenizer, and SentencePiece's own processor of the same model."""
  found = {}
  for name, options in STYLES.items():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT), model_writer=model,
        **{"minloglevel": 2, "hard_vocab_limit": False} | options,
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    found[name] = SentencePieceTokenizer(model.getvalue()), processor
  return found


@pytest.mark.parametrize("style", STYLES)
def test_joined_is_what_sentencepiece_spells_for_all_ids(models, style):
  """Tests every split of all inputs and of random ids, which include parts of characters."""
  ours, processor = models[style]
  draw = random.Random(0)
  rows = [ours.encode(text) for text in INPUTS]
  rows += [[draw.randrange(ours.vocab_size) for _ in range(9)] for _ in range(100)]
  if style.startswith(("llama", "our own")):  # Ids 3 to 258 are bytes.
    rows += [[draw.randrange(3, 259) for _ in range(6)] for _ in range(100)]
  for ids in rows:
    whole = processor.decode([i for i in ids if not processor.is_control(i)])
    for border in range(len(ids) + 1):
      prompt, new = spell(ours, ids[:border], ids[border:])
      assert prompt + new == whole, (ids, border)
      # The prompt's part is the prompt decoded alone, without an incomplete last character.
      alone = ours.decode(ids[:border])
      assert alone.startswith(prompt) and set(alone[len(prompt):]) <= {"\ufffd"}


@pytest.mark.parametrize(("style", "text", "pieces", "expected"), [
    # The space before a continuation's first word, which is lost if its ids are decoded alone.
    ("llama", "the", ["▁cat", "▁sat"], ("the", " cat sat")),
    ("llama", "function", ["_", "1"], ("function", "_1")),
    ("llama", "", ["▁the", "▁cat"], ("", "the cat")),
    ("llama", "the ", ["▁", "▁cat"], ("the ", "  cat")),
    ("t5", "the", ["▁ca", "t"], ("the", " cat")),
    # T5's normalisation: the result is the text as the model sees it.
    ("t5", "  \uff21\uff22  \ufb01ne ", ["▁café"], ("AB fine", " café")),
    ("t5", "the", ["▁", "<extra_id_0>"], ("the", " <extra_id_0>")),
    ("t5, control symbols", "the", ["▁", "<extra_id_0>", "t"], ("the", " t")),
    ("space as suffix", "the", ["c", "at▁"], ("the ", "cat ")),
    ("no space before the text", "the", ["▁cat"], ("the", " cat")),
    ("words", "the", ["▁cat"], ("the", " cat")),
    ("our own", "x", ["<0x20>", "<0x41>"], ("x", " A")),
    # A character whose bytes are split belongs to the continuation.
    ("llama", "the 漢", ["<0xE5>", "<0xAD>", "<0x97>"], ("the 漢", "字")),
    # SentencePiece decodes unknown characters as U+2047 between spaces.
    ("t5", "漢", ["▁ca", "t"], (" \u2047 ", " cat")),
])
def test_right_values(models, style, text, pieces, expected):
  ours, processor = models[style]
  ids = [processor.piece_to_id(piece) for piece in pieces]
  assert processor.unk_id() not in ids, [processor.id_to_piece(i) for i in range(ours.vocab_size)]
  assert spell(ours, ours.encode(text), ids) == expected


@pytest.mark.parametrize("style", ["llama", "our own"])
def test_a_character_that_is_split_belongs_to_the_continuation(models, style):
  ours, processor = models[style]
  ids = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in "a漢b".encode()]
  borders = [spell(ours, ids[:border], ids[border:]) for border in range(6)]
  split = [("a", "漢b")] * 3
  assert borders == [("", "a漢b"), *split, ("a漢", "b"), ("a漢b", "")]


def test_bytes_are_spelled_together_too():
  ids = list("aé→😀".encode())
  ours = tokenizer.ByteTokenizer()
  for border in range(len(ids) + 1):
    assert "".join(spell(ours, ids[:border], ids[border:])) == "aé→😀"
  assert spell(ours, ids[:2], ids[2:]) == ("a", "é→😀")
  assert spell(ours, ids[:2], [*ids[:1]]) == ("a\ufffd", "a")  # The character stays incomplete.


@pytest.mark.parametrize("style", STYLES)
def test_ids_that_are_no_text(models, style):
  """Control ids, ids beyond the vocabulary and negative ids within a text are ignored."""
  ours, _ = models[style]
  ids = ours.encode("the cat sat")
  mixed = [ours.bos_id, -1, ids[0], ours.vocab_size, *ids[1:], 10**9, ours.eos_id]
  assert ours.decode(mixed) == ours.decode(ids) != ""


@pytest.mark.parametrize("style", [*STYLES, "bytes"])
def test_a_converted_folder_gives_the_tokenizer_back(models, style, tmp_path):
  ours = tokenizer.ByteTokenizer() if style == "bytes" else models[style][0]
  files = converted_files(ours)
  assert "tokenizer.json" not in files  # That name means Hugging Face's own format.
  for name, content in files.items():
    (tmp_path / name).write_bytes(content)
  again = load_saved_tokenizer(tmp_path)
  assert type(again) is type(ours) and again.fingerprint == ours.fingerprint
  assert [again.encode(text) for text in INPUTS] == [ours.encode(text) for text in INPUTS]
  config = json.loads(files["tokenizer_config.json"])
  assert (config["add_bos_token"], config["add_eos_token"]) == (True, False)
  if style == "bytes":
    assert set(files) == {"tokenizer_config.json"}
    return
  processor = models[style][1]
  assert files["tokenizer.model"] == ours.model
  assert processor.piece_to_id(config["bos_token"]) == ours.bos_id
  assert processor.piece_to_id(config["eos_token"]) == ours.eos_id
  assert processor.piece_to_id(config["unk_token"]) == processor.unk_id()
  prefixed = {"llama", "llama, nmt_nfkc", "t5", "t5, control symbols", "words"}
  assert config["add_prefix_space"] == (style in prefixed)


def test_a_prompt_begins_with_bos():
  assert prompt_ids(tokenizer.ByteTokenizer(), "ab") == [256, 97, 98]
  assert prompt_ids(tokenizer.ByteTokenizer(), "") == [256]

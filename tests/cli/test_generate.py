"""The output of `generate`, and its refusals before it loads a run."""

import io

import jax
import pytest
import sentencepiece
from flax import nnx

from dense_jax import experiment, runs
from dense_jax.cli import generate
from dense_jax.data.tokenizer import ByteTokenizer, SentencePieceTokenizer
from dense_jax.errors import InputError
from dense_jax.generation.requests import Piece, Result
from dense_jax.generation.text import Spelling
from dense_jax.models.language_model import LanguageModel
from dense_jax.models.params import get_params

TEXT = [f"the cat sat on number {i}, naïve café: def f_{i}(x)" for i in range(200)]
STYLES = {
    "llama": {"model_type": "bpe", "vocab_size": 320, "byte_fallback": True,
              "normalization_rule_name": "identity", "remove_extra_whitespaces": False},
    "t5": {"model_type": "unigram", "vocab_size": 100, "hard_vocab_limit": False, "pad_id": 0,
           "eos_id": 1, "unk_id": 2, "bos_id": -1, "user_defined_symbols": ["<extra_id_0>"]},
}


def _sentencepiece(style):
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(TEXT), model_writer=model, minloglevel=2, **STYLES[style])
  return SentencePieceTokenizer(model.getvalue())


@pytest.fixture(scope="module")
def tokenizers():
  return {"bytes": ByteTokenizer(), "llama": _sentencepiece("llama"), "t5": _sentencepiece("t5")}


def _restores(monkeypatch, tokenizer):
  """Replaces every run by an untrained model with that tokenizer."""
  overrides = [("model.vocab_size", str(tokenizer.vocab_size)), ("model.width", "16"),
               ("model.layers", "2")]
  config = experiment.load("experiments/smoke.py:debug", overrides)
  model = LanguageModel(config.model, rngs=nnx.Rngs(0))
  run = runs.Run("a run", tokenizer, model, get_params(model), config, 4)
  monkeypatch.setattr(runs, "restore", lambda workdir, which, weights, strict: run)


def _continues(monkeypatch, rows):
  """Makes every model continue prompts with these ids; returns the prompts that it is given."""
  given = []

  class Stub:
    def __init__(self, model, tokenizer, batch_size):
      self.tokenizer = tokenizer

    def stream(self, requests, *, block):
      """Yields a piece for each token, the last row first."""
      given.extend(request.ids for request in requests)
      for index in reversed(range(len(rows))):
        spelling = Spelling(self.tokenizer, requests[index].ids)
        texts = [*(spelling.push([token]) for token in rows[index]), spelling.end()]
        for text in texts[:-1]:
          yield Piece(index, text)
        yield Piece(index, texts[-1], Result(rows[index], [], "".join(texts), "length"))

  monkeypatch.setattr(generate, "Generator", Stub)
  return given


def _pieces(tokenizer, *pieces):
  processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
  return [processor.piece_to_id(piece) for piece in pieces]


@pytest.mark.parametrize(("style", "prompt", "pieces", "printed"), [
    ("llama", "the", ["▁cat", "▁sat"], "the cat sat"),
    ("llama", " the", ["▁cat"], " the cat"),
    ("llama", "", ["▁the", "▁cat"], "the cat"),
    ("llama", "漢", ["<0xE5>", "<0xAD>", "<0x97>"], "漢字"),
    ("llama", "a", ["<0x0A>", "▁cat"], "a\n cat"),
    ("llama", "a", ["<0x1B>", "<0x5B>", "<0x0D>", "<0x0A>"], "a\ufffd[\r\n"),
    ("t5", "the", ["▁ca", "t"], "the cat"),
    ("t5", "  the \n ", ["▁ca", "t"], "the cat"),
    ("t5", "\uff43at", ["▁", "<extra_id_0>"], "cat <extra_id_0>"),
    ("t5", "", ["▁", "t", "h", "e"], "the"),
])
def test_prompt_and_continuation_are_spelled_together(
    tokenizers, monkeypatch, capsys, style, prompt, pieces, printed
):
  tokenizer = tokenizers[style]
  _restores(monkeypatch, tokenizer)
  new_ids = _pieces(tokenizer, *pieces)
  given = _continues(monkeypatch, [new_ids])
  assert generate.main(["--workdir", "run", "--prompt", prompt]) == 0
  assert capsys.readouterr().out == printed + "\n"
  assert given == [[tokenizer.bos_id, *tokenizer.encode(prompt)]]


def test_bytes_of_one_character_in_prompt_and_continuation(tokenizers, monkeypatch, capsys):
  _restores(monkeypatch, tokenizers["bytes"])
  _continues(monkeypatch, [[*"→😀".encode(), 0xE2], [0x80, 7, 27]])
  assert generate.main(["--workdir", "run", "--prompt", "a", "--prompt", "\x1bé\r\n"]) == 0
  line = "-" * 72
  expected = f"a→😀\ufffd\n{line}\n\ufffdé\r\n\ufffd\ufffd\ufffd\n{line}\n"
  assert capsys.readouterr().out == expected


@pytest.mark.slow
def test_a_real_model_with_absurd_options(tokenizers, monkeypatch, capsys):
  """Options: top_k above the vocabulary, the largest seed, and an empty prompt."""
  _restores(monkeypatch, tokenizers["bytes"])
  arguments = ["--workdir", "run", "--prompt", "", "--prompt", "a" * 300, "--max-new-tokens", "3",
               "--top-k", str(10**30), "--seed", str(2**32 - 1), "--temperature", "1e30"]
  assert generate.main(arguments) == 0
  printed = capsys.readouterr().out
  assert "a" * 300 in printed
  assert generate.main(arguments) == 0
  assert capsys.readouterr().out == printed
  jax.clear_caches()


@pytest.mark.parametrize(("option", "value", "valid"), [
    ("--seed", -1, "an integer from 0 to 4294967295"),
    ("--seed", 2**32, "an integer from 0 to 4294967295"),
    ("--seed", 10**30, "an integer from 0 to 4294967295"),
    ("--max-new-tokens", 0, "an integer from 1 to 1000000"),
    ("--max-new-tokens", -5, "an integer from 1 to 1000000"),
    ("--max-new-tokens", 10**9, "an integer from 1 to 1000000"),
    ("--max-new-tokens", 10**30, "an integer from 1 to 1000000"),
])
def test_numbers_out_of_range_are_named(option, value, valid):
  with pytest.raises(InputError, match=rf"^{option} = {value} is not valid: expected {valid}$"):
    generate.main(["--workdir", "no run", "--prompt", "a", option, str(value)])


@pytest.mark.parametrize("prompt", [
    b"caf\xe9 au lait", b"na\xc3", b"\xf0\x9f", b"\xff\xfe", b"\xed\xa0\x80", b"a\xc0\x80",
])
def test_a_prompt_that_is_not_utf8_is_named(prompt):
  """The command line passes each wrong byte as half of a surrogate pair."""
  text = prompt.decode("utf-8", "surrogateescape")
  with pytest.raises(InputError, match=r"^--prompt = .* is not valid: expected text in UTF-8$"):
    generate.main(["--workdir", "no run", "--prompt", "good", "--prompt", text])

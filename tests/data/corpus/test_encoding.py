"""Documents that are encoded by chunks have the ids of whole documents."""

import io
import json

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from dense_jax.data.byte_tokenizer import ByteTokenizer
from dense_jax.data.corpus import encoding
from dense_jax.data.corpus.encoding import DocumentEncoder, token_dtype
from dense_jax.data.sentencepiece_tokenizer import SentencePieceTokenizer
from dense_jax.data.tokenizer_training import TRAINER_OPTIONS
from tests.helpers import ROOT

SHARED = ROOT.parent / "shared/data"
LINES = [
    "the quick brown fox jumps over the lazy dog, and then the other dog jumps over the fox\n",
    "def encode(self, text):\n    return [self.ids[c] for c in text if c in self.ids]\n",
    "Es war einmal ein König, der hatte drei Söhne; naïve façade.  Two  spaces\tand a tab.\r\n",
    "1234567890 12.5 -3e10 (a+b)*(c-d) == {'x': [1, 2, 3]}\n",
    "日本語のテキスト、漢字とかな。한국어 텍스트 🙂🙃 ẞ\n",
] * 20
TEXTS = [
    "", " ", "  ", "\n", "a", "ab" * 5000, "a" * 10_000, " " * 3000, "\n\n\n  \n",
    "".join(LINES), "".join(LINES).upper(), "the dog\r\nthe\rfox\0jumps\u2028over",
    "\u2581the\u2581 fox \u2581\u2581", "\ufeff the fox", "e\u0301 👩‍👩‍👧 \U0010ffff\ufffd ﬁ ①",
    "<s> the </s> <unk> <sep>the<sep> fox", "Ж щ ъ" * 50 + "the fox" + "\U0001f600" * 200,
    "unbelievably" * 30 + " " + "x" * 63 + "y" * 65,
]
# Options of the trainer beside those of "train", which come first.
KINDS = {
    "train": {},
    "defaults": {"normalization_rule_name": "nmt_nfkc", "add_dummy_prefix": True,
                 "remove_extra_whitespaces": True, "split_by_whitespace": True,
                 "split_by_unicode_script": True, "split_by_number": True,
                 "allow_whitespace_only_pieces": False, "byte_fallback": False},
    "llama": {"add_dummy_prefix": True, "split_by_whitespace": True, "split_digits": True},
    "symbols": {"user_defined_symbols": ["<sep>", "fox jumps"], "byte_fallback": False,
                "character_coverage": 0.98},
    "suffix": {"treat_whitespace_as_suffix": True, "split_by_whitespace": True,
               "add_dummy_prefix": True},
    "unigram": {"model_type": "unigram", "split_by_whitespace": True},
}


def _train(kind: str) -> bytes:
  model = io.BytesIO()
  options = {**TRAINER_OPTIONS, **KINDS[kind]}
  options["vocab_size"] = 360 if options["byte_fallback"] else 200
  sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(LINES), model_writer=model, num_threads=1, **options
  )
  return model.getvalue()


@pytest.fixture(scope="module", params=[*KINDS])
def tokenizer(request):
  return SentencePieceTokenizer(_train(request.param))


def _whole(tokenizer, text: str) -> list[int]:
  return [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]


def _by_chunks(encode, tokenizer, texts: list[str]) -> list[list[int]]:
  dtype = token_dtype(tokenizer.vocab_size)
  return [np.frombuffer(row, dtype).tolist() for row in encode(texts)]


def test_chunks_give_the_ids_of_whole_documents(tokenizer):
  encode = DocumentEncoder(tokenizer)
  found = _by_chunks(encode, tokenizer, TEXTS)
  for text, ids in zip(TEXTS, found, strict=True):
    assert ids == _whole(tokenizer, text), text[:80]
  assert _by_chunks(encode, tokenizer, TEXTS) == found  # From the remembered chunks.


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_text(tokenizer, data):
  pieces = st.sampled_from(["the", " ", "fox", "\u2581", "<sep>", "日本", "\n", "é", "🙂", "  "])
  text = data.draw(st.one_of(st.text(max_size=200), st.lists(pieces, max_size=60).map("".join)))
  text = text.encode("utf-8", "replace").decode()
  (ids,) = _by_chunks(DocumentEncoder(tokenizer), tokenizer, [text])
  assert ids == _whole(tokenizer, text)


def test_windows_and_forgetting_change_nothing(tokenizer, monkeypatch):
  text = "".join(LINES)
  whole = _whole(tokenizer, text)
  for window, known in ((1, 1), (7, 10), (64, 1000)):
    monkeypatch.setattr(encoding, "_WINDOW", window)
    monkeypatch.setattr(encoding, "_MOST_KNOWN", known)
    assert _by_chunks(DocumentEncoder(tokenizer), tokenizer, [text]) == [whole]


def test_bytes():
  tokenizer = ByteTokenizer()
  texts = ["", "aé🙂\0", "x" * 70_000]
  assert _by_chunks(DocumentEncoder(tokenizer), tokenizer, texts) == [
      _whole(tokenizer, text) for text in texts
  ]


def test_hugging_face_files_are_encoded_whole():
  tokenizers = pytest.importorskip("tokenizers")
  from dense_jax.data.hugging_face_tokenizer import HuggingFaceTokenizer

  library = tokenizers.Tokenizer(tokenizers.models.BPE())
  library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  trainer = tokenizers.trainers.BpeTrainer(
      vocab_size=300, special_tokens=["<|endoftext|>"],
      initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
  )
  library.train_from_iterator(LINES, trainer)
  tokenizer = HuggingFaceTokenizer(library.to_str().encode())
  assert _by_chunks(DocumentEncoder(tokenizer), tokenizer, TEXTS) == [
      _whole(tokenizer, text) for text in TEXTS
  ]


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="there are no tokenizers beside the repository")
@pytest.mark.parametrize("name", ["mistral_v1_tokenizer", "axlearn_bpe_32k_c4"])
def test_published_tokenizers_on_novels(name):
  """Whole novels, and Wikipedia's text with its many scripts."""
  import gzip

  tokenizer = SentencePieceTokenizer((SHARED / f"tokenizers/{name}.model").read_bytes())
  with gzip.open(SHARED / "text/english_novels_valid.jsonl.gz", "rt") as file:
    texts = [json.loads(line)["text"] for line in file]
  texts += [(SHARED / "text/wikitext2_raw_test.txt").read_text(), *TEXTS]
  encode = DocumentEncoder(tokenizer)
  for text in texts:
    assert _by_chunks(encode, tokenizer, [text]) == [_whole(tokenizer, text)]

"""A run's report: losses of any size, and text that a terminal would obey."""

import io
import json
import math
import warnings

import numpy as np
import pytest
from PIL import Image

from dense_jax.data.token_store import TokenStore
from dense_jax.data.tokenizer import ByteTokenizer
from dense_jax.evaluation.perplexity import HeldOut
from dense_jax.formatting import table
from dense_jax.generation.requests import Result
from dense_jax.runs import plot, report
from dense_jax.runs.scoring import Score

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(("training", "heldout"), [
    ([5.0, 3.0, 2.0], [4.0]), ([], []), ([2.0], []), ([NAN, NAN], [NAN]), ([INF], [-INF]),
    ([5.0, NAN, 2.0, INF], [NAN, 4.0]), ([0.0, 0.0], [0.0]), ([1.0, 0.0, -2.0], []),
    ([1e-300, 1e299], [1.0]), ([1e308, -1e308], [1e305]), ([5e-324], [1e-310]),
    ([30786.0, 5084.0, 12.0], [1e4]), ([2.0, 2.0, 2.0], [2.0, 2.0]),
])
def test_any_losses_are_drawn(tmp_path, training, heldout):
  lines = [{"step": step, "loss": loss} for step, loss in enumerate(training, 1)]
  lines += [{"step": step, "heldout_loss": loss} for step, loss in enumerate(heldout, 1)]
  text = "".join(json.dumps(line) + "\n" for line in lines)
  (tmp_path / "metrics.jsonl").write_text(text)
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    file = plot.plot_loss(tmp_path)
  image = np.asarray(Image.open(io.BytesIO(file.read_bytes())).convert("L"))
  assert (image < 200).sum() > 100  # Axes, at least.


def _store(tokenizer, documents):
  """Makes a store of held-out documents as `samples` sees them."""
  rows = [[tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id] for text in documents]
  starts = np.cumsum([0, *map(len, rows[:-1])])
  tokens = np.concatenate([np.asarray(row) for row in rows])
  sizes = np.array([len(text.encode()) for text in documents])
  return TokenStore(tokens, starts, sizes, "a store")


@pytest.mark.parametrize("loss", [2.0, 1e4, 1e300, 0.0, INF, NAN])
def test_the_table_of_any_loss(loss):
  score = Score(HeldOut(loss, 1, 64), loss / 2, 10, windows=9, scored=9)
  metrics = [{"step": step, "tokens_per_second": speed, "peak_memory_bytes": step * 2**20}
             for step, speed in enumerate([1.0, INF, 3.0, NAN])]
  rows = report.resources(score, metrics[:3])
  assert dict(rows)["training tokens/s (median)"] == "3"
  assert dict(rows)["peak memory (RSS)"] == "2 MiB"
  assert dict(rows)["context"] == "fresh every 64 tokens"
  compared = report.comparison(score, b"some text", b"a", "this model")
  text = table([*compared, *report.resources(score, metrics)])
  assert max(map(len, text.splitlines())) < 70


def test_the_table_says_how_much_was_scored_and_leaves_out_what_is_not_known():
  score = Score(HeldOut(2.0, 1), 1.0, 10, windows=1000, scored=64)
  rows = dict(report.resources(score, [{"step": 1}]))
  assert rows["windows scored"] == "64 of 1,000"
  assert not {"context", "training tokens/s (median)", "peak memory (RSS)"} & set(rows)


@pytest.mark.parametrize(("document", "new", "expected"), [
    ("short", b" and more", ("short", " and more")),
    # 23 tokens of a document are its prompt: here the last is the first byte of a character.
    ("a" * 22 + "→ b", "→ c".encode()[1:], ("a" * 22, "→ c")),
    ("a" * 21 + "😀", "😀".encode()[2:], ("a" * 21, "😀")),
    ("a" * 22 + "\r\nb", b"\nc", ("a" * 22 + "\r", "\nc")),
    ("a" * 22 + "\r\nb", b"c", ("a" * 22 + "\ufffd", "c")),
    ("\x1b[2J\xa0👨\u200d👩", b"\x07", ("\ufffd[2J\xa0👨\u200d👩", "\ufffd")),
    ("a" * 22 + "é", b"b", ("a" * 22 + "\ufffd", "b")),
])
def test_samples_join_to_what_is_spelled(monkeypatch, document, new, expected):
  class Stub:
    def __init__(self, model, batch_size):
      pass

    def __call__(self, requests):
      prompts = [request.ids for request in requests]
      assert all(prompt[0] == ByteTokenizer.bos_id and len(prompt) <= 24 for prompt in prompts)
      return [Result(list(new), [], "", "length") for _ in prompts]

  monkeypatch.setattr(report, "Generator", Stub)
  tokenizer = ByteTokenizer()
  store = _store(tokenizer, [document])
  assert report.samples(None, store, tokenizer, seed=0) == [expected, expected]

"""A finished run's report: losses of any size, text that a terminal would obey."""

import io
import json
import math
import types
import warnings

import numpy as np
import pytest
from PIL import Image

from dense_jax.cli import report
from dense_jax.data.tokenizer import ByteTokenizer
from dense_jax.evaluation.perplexity import HeldOut

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
    file = report.plot_loss(tmp_path)
  image = np.asarray(Image.open(io.BytesIO(file.read_bytes())).convert("L"))
  assert (image < 200).sum() > 100  # Axes, at least.


@pytest.mark.parametrize(("held_out", "bits", "line"), [
    (HeldOut(535.9, 100), 1.793,
     "held-out loss 5.3590 nats/token, perplexity 212.51, 1.793 bits/byte"),
    (HeldOut(535.9, 100, 256), 1.793,
     "held-out loss 5.3590 nats/token, perplexity 212.51, 1.793 bits/byte (context: fresh every "
     "256 tokens)"),
    (HeldOut(5084.25, 1), 7338.5,
     "held-out loss 5084.2500 nats/token, perplexity inf, 7338.500 bits/byte"),
    (HeldOut(500.0, 1), 1e30,
     "held-out loss 500.0000 nats/token, perplexity 1.404e+217, 1.000e+30 bits/byte"),
    (HeldOut(1e300, 1), INF, "held-out loss 1.000e+300 nats/token, perplexity inf, inf bits/byte"),
    (HeldOut(NAN, 1, 32), NAN, "held-out loss nan (context: fresh every 32 tokens)"),
    (HeldOut(INF, 1), INF, "held-out loss inf"), (HeldOut(-INF, 1), -INF, "held-out loss -inf"),
])
def test_one_line_of_figures(held_out, bits, line):
  assert report.perplexity_line(held_out, bits) == line


def _data(tokenizer, documents):
  """Held-out documents as `samples` and `comparison` see them."""
  rows = [[tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id] for text in documents]
  starts = np.cumsum([0, *map(len, rows[:-1])])
  tokens = np.concatenate([np.asarray(row) for row in rows])
  store = types.SimpleNamespace(
      tokens=tokens, starts=starts, num_documents=len(rows), num_tokens=len(tokens),
      num_targets=len(tokens) - len(rows), num_bytes=sum(len(text.encode()) for text in documents),
  )
  source = [types.SimpleNamespace(text=text) for text in documents]
  return types.SimpleNamespace(
      tokenizer=tokenizer, heldout=store, train_source=source, heldout_source=source)


@pytest.mark.parametrize("loss", [2.0, 1e4, 1e300, 0.0, INF, NAN])
def test_the_closing_table_of_any_loss(loss):
  data = _data(ByteTokenizer(), ["some text", "a"])
  text = report.comparison(HeldOut(loss, 1, 64), data, "this model", [1.0, INF, NAN])
  assert "fresh every 64 tokens" in text
  assert max(map(len, text.splitlines())) < 70


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
    def __init__(self, model, sampling):
      pass

    def __call__(self, prompts, **options):
      assert all(prompt[0] == ByteTokenizer.bos_id and len(prompt) <= 24 for prompt in prompts)
      return [list(new) for _ in prompts]

  monkeypatch.setattr(report, "Generator", Stub)
  data = _data(ByteTokenizer(), [document])
  assert report.samples(None, data, seed=0) == [expected, expected]

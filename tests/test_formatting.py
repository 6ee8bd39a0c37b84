"""Text for people: safe on a terminal, and tables that Markdown reads as they were meant."""

import pytest

from dense_jax.formatting import markdown_table, printable


@pytest.mark.parametrize(("text", "shown"), [
    ("plain\ttext\nand\r\nlines\n", "plain\ttext\nand\r\nlines\n"),
    ("a\rb\r\r\nc\r", "a\ufffdb\ufffd\r\nc\ufffd"),
    ("\0\x07\x08\x0b\x0c\x1b[2J\x7f", "\ufffd" * 6 + "[2J\ufffd"),
    ("\x80\x85\x9b31m\x9f", "\ufffd\ufffd\ufffd31m\ufffd"),
    ("\u202atext\u202e \u2066x\u2069", "\ufffdtext\ufffd \ufffdx\ufffd"),
    # None of these is a control character, though Python calls some of them not printable.
    *((text, text) for text in (
        "\xa0 \u3000 \u2009", "👨\u200d👩\u200d👧 🏴\U000e0067\U000e007f", "e\u0301 \u200f\u200e",
        "\xad \u200b \ufeff \u2028 \ue000", "\ufffd \U0010ffff", "हिन्दी ไทย 日本語",
    )),
])
def test_only_controls_are_replaced(text, shown):
  assert printable(text) == shown


@pytest.mark.parametrize(("numbers", "rule"), [
    ({}, "| --- | ---: | ---: |"), ({"numbers": slice(1, -1)}, "| --- | ---: | --- |"),
    ({"numbers": slice(0)}, "| --- | --- | --- |"),
])
def test_a_cell_stays_a_cell(numbers, rule):
  rows = [("name", "loss", "note"), ("a|b", 1.5, "two\nlines")]
  assert markdown_table(rows, **numbers).split("\n") == [
      "| name | loss | note |", rule, "| a\\|b | 1.5 | two lines |",
  ]

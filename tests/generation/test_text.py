"""Text as it comes: whole characters, and nothing from a stop string on."""

import random

import pytest

from dense_jax.data.spelling import spell
from dense_jax.data.tokenizer import ByteTokenizer
from dense_jax.generation.text import CONTEXT, Spelling, TextEnd

TEXTS = [
    "plain", "é→😀", "👨\u200d👩\u200d👧 e\u0301\r\n\0", "\ufffd literal \ufffd\ufffd", "",
    "long " * 60 + "😀" * 60,
]


def _pieces(prompt, new, size):
  spelling = Spelling(ByteTokenizer(), list(prompt))
  pieces = [spelling.push(list(new[start : start + size])) for start in range(0, len(new), size)]
  return [*pieces, spelling.end()]


@pytest.mark.parametrize("size", [1, 2, 7, 64])
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_whole_characters_and_join_to_the_text(text, size):
  for prompt in ("", "a", "é"):
    pieces = _pieces(prompt.encode(), text.encode(), size)
    assert "".join(pieces) == text
    # Each is a part of the text, so that no character was shown before it was complete.
    assert all(piece in text for piece in pieces)


@pytest.mark.parametrize("size", [1, 3])
def test_any_bytes_are_spelled_as_all_of_them_together(size):
  """Bytes that are no UTF-8, and characters that the continuation completes."""
  draw = random.Random(0)
  for _ in range(300):
    some = [draw.choice(["😀", "é", "a", "\ufffd"]).encode() for _ in range(8)]
    content = b"".join(some)
    broken = bytes(byte for byte in content if draw.random() > 0.1)
    cut = draw.randrange(len(broken) + 1)
    prompt, new = broken[:cut], broken[cut:]
    expected = spell(ByteTokenizer(), list(prompt), list(new))[1]
    assert "".join(_pieces(prompt, new, size)) == expected


def test_a_character_that_a_later_piece_completes_is_held_back():
  spelling = Spelling(ByteTokenizer(), list("a→".encode()[:-1]))
  first, second, third, last = "→😀".encode()[2:4], "😀".encode()[1:3], "😀".encode()[3:], b"b"
  assert [spelling.push(list(each)) for each in (first, second, third, last)] == [
      "→", "", "😀", "b"
  ]
  assert spelling.push([0xE2]) == "" and spelling.end() == "\ufffd"


def test_the_time_of_a_piece_does_not_grow_with_the_text():
  decoded = []

  class Counting(ByteTokenizer):
    def decode(self, ids):
      decoded.append(len(ids))
      return super().decode(ids)

  spelling = Spelling(Counting(), [97] * 1000)
  for _ in range(500):
    assert spelling.push([98] * 10) == "b" * 10
  assert max(decoded) <= 4 * CONTEXT + 10


@pytest.mark.parametrize(("stops", "text", "expected"), [
    (["\n\n"], "a\n\nb", "a"), (["END", "\n"], "one END\n", "one "), (["ab", "b"], "xxab", "xx"),
    (["bc", "abcd"], "xabc", "xa"), (["b", "abc"], "abc", "a"), (["aab"], "aaab", "a"),
    (["x"], "x", ""),
    (["none"], "no non nono", "no non nono"), ([], "text", "text"), (["😀é"], "a😀é", "a"),
])
def test_a_text_ends_before_a_stop_string_wherever_pieces_end(stops, text, expected):
  for size in range(1, len(text) + 1):
    end, shown = TextEnd(stops), ""
    for start in range(0, len(text), size):
      new, is_complete = end.push(text[start : start + size])
      shown += new
      # Nothing is shown that turns out to be part of a stop string.
      assert expected.startswith(shown)
      if is_complete:
        break
    else:
      shown += end.end()
    assert shown == expected


def test_what_may_become_a_stop_string_is_held_back():
  end = TextEnd(["STOP", "TO"])
  assert end.push("a S") == ("a ", False)
  assert end.push("T") == ("", False)
  assert end.push("X") == ("STX", False)
  assert end.push(" ST") == (" ", False)
  assert end.push("O") == ("S", True)

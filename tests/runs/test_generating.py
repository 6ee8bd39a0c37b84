"""A model that was taught to answer is given prompts as in training."""

import pytest

from dense_jax.data.spelling import chat_ids
from dense_jax.data.templates import NAMED, Message, parse_template
from dense_jax.data.tokenizer import ByteTokenizer
from dense_jax.runs.generating import turn_ids
from dense_jax.runs.restoring import LoadedModel

TOKENIZER = ByteTokenizer()
TEMPLATES = [*NAMED, r"Q: {prompt}\nA:"]


def model(template):
  return LoadedModel("a model", TOKENIZER, None, {}, template=template)


@pytest.mark.parametrize("name", TEMPLATES)
def test_turns_are_the_ids_of_training(name):
  template = parse_template(name)
  first = [Message("user", "What is 1 + 1?")]
  both = [*first, Message("assistant", "2"), Message("user", "And 2 + 2?")]
  ids = turn_ids(model(template), "What is 1 + 1?", begins=True)
  assert ids == chat_ids(TOKENIZER, template, first)
  ids += TOKENIZER.encode("2") + turn_ids(model(template), "And 2 + 2?", begins=False)
  assert ids == chat_ids(TOKENIZER, template, both)


def test_hand_spelled_turns():
  taught = model(parse_template(r"Q: {prompt}\nA:"))
  assert turn_ids(taught, "x", begins=True) == [256, *b"Q: x\nA:"]
  assert turn_ids(taught, "x", begins=False) == [257, *b"Q: x\nA:"]
  assert turn_ids(taught, "", begins=False) == []
  assert turn_ids(taught, "", begins=True) == [256]


def test_a_model_without_a_template_continues_the_text():
  assert turn_ids(model(None), "x", begins=True) == [256, 120]
  assert turn_ids(model(None), "x", begins=False) == [120]

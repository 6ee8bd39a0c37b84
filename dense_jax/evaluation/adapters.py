"""Adapters from the formats in which evaluation sets are published to `Record`.

Each adapter takes one line's values and raises ValueError, KeyError, TypeError or IndexError for
what it does not understand; `FORMS` says what it expects.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from dense_jax.evaluation.tasks import Record

Values = Mapping[str, Any]
Adapter = Callable[[Values], Record]


def _text(values: Values, key: str) -> str:
  if not isinstance(values[key], str):
    raise TypeError(f"{key} is no text")
  return values[key]


def _index(value: Any, count: int) -> int:
  """Returns a choice's index from 0, which may be an integer or its digits."""
  index = int(value)
  if isinstance(value, float) or not 0 <= index < count:
    raise ValueError(f"{value!r} is not one of {count} choices")
  return index


def _name(values: Values) -> str:
  keys = ("id", "ind", "idx", "qID", "InputStoryid")
  return next((str(values[key]) for key in keys if key in values), "")


def _named_choices(values: Values) -> tuple[str, tuple[str, ...], int]:
  """Returns question, choices and the right one, of three published layouts."""
  question: Any = values.get("question", values.get("question_stem"))
  choices: Any = values.get("choices")
  if isinstance(question, dict):  # As ARC and OpenBookQA were first published.
    question, choices = question["stem"], question["choices"]
    choices = {key: [choice[key] for choice in choices] for key in ("text", "label")}
  if isinstance(choices, dict):
    texts = choices["text"]
    gold = list(choices["label"]).index(_text(values, "answerKey").strip())
  else:
    texts = choices
    gold = _index(values["label"], len(texts))
  if not isinstance(question, str) or not all(isinstance(text, str) for text in texts):
    raise TypeError("question and choices are no texts")
  return question, tuple(texts), gold


def _question(values: Values) -> Record:
  question, choices, gold = _named_choices(values)
  return Record({"question": question}, choices, gold, _name(values))


def _without_marks(text: str) -> str:
  """Removes what is left of WikiHow's layout, as the harness does."""
  text = text.strip().replace(" [title]", ". ")
  return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _hellaswag(values: Values) -> Record:
  if "ctx_a" in values:
    context = f"{_text(values, 'ctx_a')} {_text(values, 'ctx_b').capitalize()}"
  else:
    context = _text(values, "ctx_lmeval")
  query = _without_marks(f"{_text(values, 'activity_label')}: {context}")
  endings = tuple(_without_marks(ending) for ending in values["endings"])
  gold = _index(values["label"], len(endings))
  return Record({"query": query}, endings, gold, _name(values))


def _piqa(values: Values) -> Record:
  choices = _text(values, "sol1"), _text(values, "sol2")
  fields = {"question": _text(values, "goal")}
  return Record(fields, choices, _index(values["label"], 2), _name(values))


def _winogrande(values: Values) -> Record:
  before, blank, after = _text(values, "sentence").partition("_")
  if not blank:
    raise ValueError("the sentence has no _")
  choices = _text(values, "option1"), _text(values, "option2")
  fields = {"before": before, "after": after.strip()}
  return Record(fields, choices, _index(int(values["answer"]) - 1, 2), _name(values))


def _boolq(values: Values) -> Record:
  answer = values["answer"] if "answer" in values else values["label"]
  fields = {"passage": _text(values, "passage"), "question": _text(values, "question")}
  return Record(fields, ("no", "yes"), _index(answer, 2), _name(values))


def _copa(values: Values) -> Record:
  connector = {"cause": "because", "effect": "therefore"}[values["question"]]
  choices = tuple(
      " " + choice[0].lower() + choice[1:]
      for choice in (_text(values, "choice1"), _text(values, "choice2"))
  )
  fields = {"premise": _text(values, "premise").strip()[:-1], "connector": connector}
  return Record(fields, choices, _index(values["label"], 2), _name(values))


def _lambada(values: Values) -> Record:
  words = _text(values, "text").split(" ")
  if len(words) < 2:
    raise ValueError("the text is one word")
  return Record({"passage": " ".join(words[:-1])}, (" " + words[-1],), 0, _name(values))


def _storycloze(values: Values) -> Record:
  story = " ".join(_text(values, f"InputSentence{number}") for number in (1, 2, 3, 4))
  choices = tuple(_text(values, f"RandomFifthSentenceQuiz{number}") for number in (1, 2))
  gold = _index(int(_text(values, "AnswerRightEnding")) - 1, 2)
  return Record({"story": story}, choices, gold, _name(values))


def _page(values: Values) -> Record:
  return Record({}, (_text(values, "page"),))


_CHOICES = (
    'question (or question_stem) and choices (texts) with label (0 is the first), or "choices": '
    '{"text", "label"} with answerKey, or "question": {"stem", "choices": [{"text", "label"}]} '
    'with answerKey'
)

# Task -> its adapter, and the fields that it expects.
ADAPTERS: Mapping[str, Adapter] = {
    "wikitext": _page, "lambada": _lambada, "hellaswag": _hellaswag, "piqa": _piqa,
    "winogrande": _winogrande, "arc_easy": _question, "arc_challenge": _question,
    "boolq": _boolq, "copa": _copa, "openbookqa": _question, "storycloze": _storycloze,
}
FORMS: Mapping[str, str] = {
    "wikitext": "UTF-8 text with pages that begin with ' = Title = '",
    "lambada": "text, a passage of at least two words",
    "hellaswag": "activity_label, ctx_a and ctx_b (or ctx_lmeval), endings, and label (0 is the "
                 "first)",
    "piqa": "goal, sol1, sol2, and label (0 or 1) here or in a file of labels, one a line",
    "winogrande": 'sentence with _ in it, option1, option2, and answer ("1" or "2")',
    "arc_easy": _CHOICES,
    "arc_challenge": _CHOICES,
    "boolq": "passage, question, and answer or label (true or false)",
    "copa": 'premise, choice1, choice2, question ("cause" or "effect"), and label (0 or 1)',
    "openbookqa": _CHOICES,
    "storycloze": "columns InputSentence1 to 4, RandomFifthSentenceQuiz1 and 2, and "
                  "AnswerRightEnding (1 or 2)",
}

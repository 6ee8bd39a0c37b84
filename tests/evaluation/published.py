"""A few documents of every task, in the formats in which the sets are published."""

import csv
import json
import pathlib

_PAGES = """
 = First Page =

 It was 1 @,@ 000 miles , or so ( they said ) ; the " end " was near .
 = = A section = =

 The dogs ' bowl was empty @-@ handed : 3 @.@ 5 \u00b0 and no 's .
 = Second Page =

 Nothing . Na\u00efve caf\u00e9s , \u65e5\u672c .
"""
_LABELS = "ABCD"


def _write(file: pathlib.Path, documents: list[dict]) -> None:
  file.write_text("".join(json.dumps(document) + "\n" for document in documents))


def _question(number: int, key: str, choices: int) -> dict:
  texts = [f"the {'very ' * choice}tall tree {number}" for choice in range(choices)]
  labels = list(_LABELS[:choices]) if number % 2 else [str(i + 1) for i in range(choices)]
  named = {"text": texts, "label": labels}
  return {"id": f"q{number}", key: f"What of number {number}?", "choices": named,
          "answerKey": labels[number % choices]}


def write(folder: pathlib.Path, count: int = 4) -> None:
  """Writes so many documents of each task, and as many examples of ARC; two of WikiText."""
  numbers = range(count)
  (folder / "wiki.test.raw").write_text(_PAGES, encoding="utf-8")
  words = ("seven", "caf\u00e9", "red-ish.", "\u65e5")
  _write(folder / "lambada_test.jsonl", [
      {"text": f"He went to the  house,\nand the number {i} of the house was {words[i % 4]}"}
      for i in numbers
  ])
  _write(folder / "hellaswag_val.jsonl", [{
      "ind": i, "activity_label": "Home and Garden",
      "ctx_a": f"[header] How to dig {i} [title] Dig", "ctx_b": "then THE  man",
      "label": str(i % 4),
      "endings": [f"digs{' more' * n} [step] {n}.   Ends." for n in range(4)],
  } for i in numbers])
  _write(folder / "piqa_valid.jsonl", [
      {"goal": f"Open jar {i}", "sol1": "turn it", "sol2": "turn  it to the left", "label": i % 2}
      for i in numbers
  ])
  _write(folder / "winogrande_dev.jsonl", [
      {"sentence": f"Ann told Bob that _ was number {i}.", "option1": "Ann", "option2": "Bob",
       "answer": str(1 + i % 2)} for i in numbers
  ])
  for name in ("arc_easy", "arc_challenge"):
    _write(folder / f"{name}_test.jsonl", [_question(i, "question", 3 + i % 2) for i in numbers])
    _write(folder / f"{name}_validation.jsonl",
           [_question(count + i, "question", 4) for i in numbers])
  _write(folder / "boolq_dev.jsonl", [
      {"passage": f"Water is wet. {i}", "question": "is water wet", "answer": i % 2 == 0}
      for i in numbers
  ])
  _write(folder / "copa_dev.jsonl", [
      {"premise": f"The man fell {i}.", "choice1": "He slept.", "choice2": "It was icy.",
       "question": ("cause", "effect")[i % 2], "label": i % 3 % 2} for i in numbers
  ])
  _write(folder / "openbookqa_test.jsonl", [_question(i, "question_stem", 4) for i in numbers])
  with open(folder / "storycloze_val.csv", "w", newline="") as out:
    names = [f"InputSentence{n}" for n in range(1, 5)] + [
        "RandomFifthSentenceQuiz1", "RandomFifthSentenceQuiz2", "AnswerRightEnding"]
    rows = csv.writer(out)
    rows.writerow(["InputStoryid", *names])
    for i in numbers:
      rows.writerow([f"s{i}", "Al ran.", f"He ran {i} miles.", "He, too, fell.", "He got up.",
                     "He ran on.", "He flew  away.", 1 + i % 2])

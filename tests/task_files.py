"""Small files of all eleven tasks, in the formats in which the sets are published."""

import gzip
import json
import pathlib

# Task -> the file's name and its lines. What is right is at different places.
LINES = {
    "lambada": ("lambada_openai_test.jsonl", [
        {"text": "She opened the door and there stood the old cat"},
        {"text": "He had lost the key.\nAll day he looked for the key"},
        {"text": "They sang until the rain began, and then they went home"},
    ]),
    "hellaswag": ("hellaswag_val.jsonl.gz", [
        {"ind": 4, "activity_label": "Making tea", "ctx_a": "A man fills a kettle.",
         "ctx_b": "he", "ctx": "A man fills a kettle. he", "label": 2,
         "endings": ["sings [title] loud.", "eats  it.", "boils the water.", "sleeps."]},
        {"ind": 9, "activity_label": "Golf", "ctx_a": "[header] A ball.", "ctx_b": "",
         "ctx": "[header] A ball.", "label": "0",
         "endings": ["It rolls.", "It flies away.", "It is red.", "It barks."]},
        {"id": 11, "activity_label": "Roofs", "ctx": "A man is on a roof. he",
         "ctx_lmeval": "A man is on a roof. He", "label": 3,
         "endings": ["is asleep.", "eats.", "is a roof.", "pulls up the old roofing."]},
    ]),
    "piqa": ("piqa_valid.jsonl", [
        {"goal": "boil an egg", "sol1": "put it in hot water", "sol2": "put it in a shoe"},
        {"goal": "cut bread", "sol1": "use a spoon", "sol2": "use a knife"},
    ]),
    "winogrande": ("winogrande_dev.jsonl", [
        {"qID": "a-1", "sentence": "The cup fits the box as the _ is small.", "option1": "cup",
         "option2": "box", "answer": "1"},
        {"qID": "a-2", "sentence": "Ann paid Eve because _ was owed.", "option1": "Ann",
         "option2": "Eve", "answer": "2"},
    ]),
    "arc_easy": ("arc_easy_test.jsonl", [
        {"id": "M_1", "question": "What is wet?", "choices": ["fire", "water", "sand"], "label": 1},
        {"id": "M_2", "question": "What is hot?",
         "choices": {"text": ["ice", "snow", "milk", "fire"], "label": ["1", "2", "3", "4"]},
         "answerKey": "4"},
    ]),
    "arc_challenge": ("ARC-Challenge/ARC-Challenge-Test.jsonl", [
        {"id": "C_1", "answerKey": "B", "question": {"stem": "Which is a star?", "choices": [
            {"text": "the Moon", "label": "A"}, {"text": "the Sun", "label": "B"}]}},
        {"id": "C_2", "answerKey": "A", "question": {"stem": "Which is a fish?", "choices": [
            {"text": "a cod", "label": "A"}, {"text": "a cow", "label": "B"}]}},
    ]),
    "boolq": ("boolq_dev.jsonl", [
        {"question": "is ice cold", "title": "Ice", "answer": True, "passage": "Ice is cold."},
        {"question": "is fire wet", "idx": 7, "label": 0, "passage": "Fire is dry."},
    ]),
    "copa": ("copa_dev.jsonl", [
        {"premise": "The man broke his toe.", "choice1": "He got a hole in his sock.",
         "choice2": "He dropped a hammer.", "question": "cause", "label": 1, "idx": 0},
        {"premise": "I tipped the bottle. ", "choice1": "The liquid poured out.",
         "choice2": "It froze.", "question": "effect", "label": 0, "idx": 1},
    ]),
    "openbookqa": ("openbookqa_test.jsonl", [
        {"question": "Plants need", "choices": ["light", "cars"], "label": 0},
        {"id": "8-343", "question": {"stem": "Fish live in", "choices": [
            {"text": "trees", "label": "A"}, {"text": "water", "label": "B"}]}, "answerKey": "B"},
        {"id": "9", "question_stem": "Birds have",
         "choices": {"text": ["wings", "wheels"], "label": ["A", "B"]}, "answerKey": " A"},
    ]),
}
STORIES = (
    "InputStoryid,InputSentence1,InputSentence2,InputSentence3,InputSentence4,"
    "RandomFifthSentenceQuiz1,RandomFifthSentenceQuiz2,AnswerRightEnding\n"
    '138d5bfb,Rick was sad.,"He ate, then slept.",He woke.,He ran.,He is happy now.,'
    "He is a car.,1\n"
    "bff9f820,Al had a dog.,It ran off.,He called.,It came.,He cried.,He was glad.,2\n"
)
PAGES = (
    " \n = Old Town = \n \n Old Town is a town in the north @-@ east . It has 1 @,@ 200 people . \n"
    " \n = = History = = \n \n It was built ( by hand ) in 900 . \n \n = New River = \n \n"
    " The river 's length is 40 km . \n \n"
)
COUNTS = {name: len(lines) for name, (_, lines) in LINES.items()} | {"storycloze": 2, "wikitext": 2}


def write_lines(path: pathlib.Path, lines: list[dict]) -> None:
  """Writes objects as JSON, one a line."""
  text = "".join(json.dumps(line) + "\n" for line in lines).encode()
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)


def write_all(folder: pathlib.Path) -> pathlib.Path:
  """Writes the files of all tasks, those in text form below `text`."""
  for name, lines in LINES.values():
    write_lines(folder / "eval" / name, lines)
  (folder / "eval" / "piqa_valid-labels.lst").write_text("0\n1\n")
  (folder / "eval" / "cloze_test_val__spring2016 - cloze_test_ALL_val.csv").write_text(STORIES)
  (folder / "text").mkdir()
  (folder / "text" / "wikitext2_raw_test.txt").write_text(PAGES)
  return folder

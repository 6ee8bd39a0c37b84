"""Tasks: what is scored of each published format, few-shot prompts, numbers by hand, refusals."""

import json
import math

import pytest

from dense_jax.errors import InputError
from dense_jax.evaluation.likelihood import Scored
from dense_jax.evaluation.task_data import load_task
from dense_jax.evaluation.task_metrics import compute_metrics, right_choices
from dense_jax.evaluation.tasks import TASKS, Item, count_words, detokenized, parse_names
from tests.task_files import COUNTS, LINES, PAGES, write_all, write_lines


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return write_all(tmp_path_factory.mktemp("data"))


def item(folder, name, index=0, **options):
  return load_task(name, str(folder), **options).items[index]


def test_every_task_is_read_whole(folder):
  assert set(COUNTS) == set(TASKS) and len(TASKS) == 11
  for name, count in COUNTS.items():
    data = load_task(name, str(folder))
    assert (len(data.items), data.total, data.shots) == (count, count, 0), name
    assert all(len(digest) == 64 for digest in data.files.values())
    for one in data.items:
      assert len(one.pairs) == len(one.choices) and 0 <= one.gold < len(one.pairs)


# What the harness's task files make of the same records.
@pytest.mark.parametrize(("name", "index", "pairs", "gold"), [
    ("lambada", 1, [("He had lost the key.\nAll day he looked for the", " key")], 0),
    ("hellaswag", 0, [("Making tea: A man fills a kettle. He", " " + ending) for ending in (
        "sings. loud.", "eats it.", "boils the water.", "sleeps.")], 2),
    ("hellaswag", 1, [("Golf: A ball.", " " + ending) for ending in (
        "It rolls.", "It flies away.", "It is red.", "It barks.")], 0),
    ("hellaswag", 2, [("Roofs: A man is on a roof. He", " " + ending) for ending in (
        "is asleep.", "eats.", "is a roof.", "pulls up the old roofing.")], 3),
    ("piqa", 1, [("Question: cut bread\nAnswer:", " use a spoon"),
                 ("Question: cut bread\nAnswer:", " use a knife")], 1),
    ("winogrande", 0, [("The cup fits the box as the cup", " is small."),
                       ("The cup fits the box as the box", " is small.")], 0),
    ("arc_easy", 0, [("Question: What is wet?\nAnswer:", " fire"),
                     ("Question: What is wet?\nAnswer:", " water"),
                     ("Question: What is wet?\nAnswer:", " sand")], 1),
    ("arc_easy", 1, [("Question: What is hot?\nAnswer:", " " + choice)
                     for choice in ("ice", "snow", "milk", "fire")], 3),
    ("arc_challenge", 0, [("Question: Which is a star?\nAnswer:", " the Moon"),
                          ("Question: Which is a star?\nAnswer:", " the Sun")], 1),
    ("boolq", 0, [("Ice is cold.\nQuestion: is ice cold?\nAnswer:", " no"),
                  ("Ice is cold.\nQuestion: is ice cold?\nAnswer:", " yes")], 1),
    ("boolq", 1, [("Fire is dry.\nQuestion: is fire wet?\nAnswer:", " no"),
                  ("Fire is dry.\nQuestion: is fire wet?\nAnswer:", " yes")], 0),
    ("copa", 0, [("The man broke his toe because", "  he got a hole in his sock."),
                 ("The man broke his toe because", "  he dropped a hammer.")], 1),
    ("copa", 1, [("I tipped the bottle therefore", "  the liquid poured out."),
                 ("I tipped the bottle therefore", "  it froze.")], 0),
    ("openbookqa", 0, [("Plants need", " light"), ("Plants need", " cars")], 0),
    ("openbookqa", 1, [("Fish live in", " trees"), ("Fish live in", " water")], 1),
    ("openbookqa", 2, [("Birds have", " wings"), ("Birds have", " wheels")], 0),
    ("storycloze", 0, [("Rick was sad. He ate, then slept. He woke. He ran.", " " + ending)
                       for ending in ("He is happy now.", "He is a car.")], 0),
    ("wikitext", 1, [("", " = New River =\n\nThe river's length is 40 km.\n\n")], 0),
])
def test_what_is_scored(folder, name, index, pairs, gold):
  found = item(folder, name, index)
  assert list(found.pairs) == pairs
  assert found.gold == gold


def test_pages_and_their_words():
  page = PAGES[PAGES.index(" = New"):]
  assert detokenized(" a ( b ) , c @-@ d \n = = H = = \n").startswith(" a (b), c-d\n")
  assert detokenized("x = = = y = = = \n").startswith("x === y ===\n")
  # The parts between white space, and an empty one at each end.
  assert count_words(page) == 14 and count_words("a b") == 2


def test_examples_of_a_few_shot_prompt(folder, tmp_path):
  shot = "Question: What is hot?\nAnswer: fire\n\n"
  assert item(folder, "arc_easy", 0, shots=1).pairs[0] == (
      shot + "Question: What is wet?\nAnswer:", " fire")
  write_lines(tmp_path / LINES["arc_easy"][0], LINES["arc_easy"][1])
  write_lines(tmp_path / "arc_easy_validation.jsonl", [
      {"question": "Q", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"},
  ])
  data = load_task("arc_easy", str(tmp_path), shots=1, limit=1)
  assert [one.pairs[0][0] for one in data.items] == [
      "Question: Q\nAnswer: y\n\nQuestion: What is wet?\nAnswer:"]
  assert (data.shots, data.total, len(data.files)) == (1, 2, 2)
  # The blank's example has the right option in it, and a word's the word.
  assert item(folder, "winogrande", 0, shots=1).pairs[1][0] == (
      "Ann paid Eve because Eve was owed.\n\nThe cup fits the box as the box")
  assert item(folder, "lambada", 2, shots=2).pairs[0][0].startswith(
      "She opened the door and there stood the old  cat\n\nHe had lost the key.\n")
  assert item(folder, "lambada", 0, shots=2).pairs[0][0].startswith("He had lost")
  assert item(folder, "wikitext", 0, shots=5).pairs[0][0] == ""
  with pytest.raises(InputError, match="--shots = 3 is not valid: expected at most 2"):
    load_task("lambada", str(folder), shots=3)


def test_lengths_that_scores_are_divided_by():
  one = Item("", (("", ""),) * 2, ("no", "\u00e9\u00e9\u00e9"), 1)  # 2 and 3 characters, 6 bytes.
  scored = [Scored(-2.0, False), Scored(-2.9, False)]
  assert right_choices(one, scored) == {"acc": False, "acc_norm": True, "acc_bytes": True}
  scored = [Scored(-1.0, False), Scored(-2.0, False)]  # -1/2, -2/3; -1/2, -2/6
  assert right_choices(one, scored) == {"acc": False, "acc_norm": False, "acc_bytes": True}


def test_numbers_and_their_errors(folder):
  words = load_task("lambada", str(folder)).items
  metrics = compute_metrics("lambada", words, [
      (Scored(-1.0, True),), (Scored(-3.0, False),), (Scored(-2.0, False),)])
  assert metrics.values == pytest.approx({"acc": 1 / 3, "perplexity": math.exp(2)})
  assert metrics.errors["acc"] == pytest.approx(math.sqrt(1 / 3) / math.sqrt(3))
  assert metrics.errors["perplexity"] == pytest.approx(math.exp(2) / math.sqrt(3))
  pages = load_task("wikitext", str(folder)).items
  metrics = compute_metrics("wikitext", pages, [(Scored(-60.0, False),), (Scored(-20.0, False),)])
  number, size = sum(count_words(page.choices[0]) for page in pages), len(PAGES.encode()) - 3
  assert metrics.counts == {"items": 2, "words": number, "bytes": size}
  assert metrics.values == pytest.approx({
      "word_perplexity": math.exp(80 / number), "byte_perplexity": math.exp(80 / size),
      "bits_per_byte": 80 / size / math.log(2)})
  assert all(error > 0 for error in metrics.errors.values())
  assert math.isnan(compute_metrics("lambada", words[:1], [(Scored(-1.0, True),)]).errors["acc"])


@pytest.mark.parametrize(("name", "line", "message"), [
    ("lambada", {"text": "one"}, "the text is one word; expected text, a passage of at least two"),
    ("lambada", {"txt": "a b"}, "no 'text'; expected text"),
    ("hellaswag", {**LINES["hellaswag"][1][0], "label": 4}, "4 is not one of 4 choices"),
    ("winogrande", {**LINES["winogrande"][1][0], "sentence": "x"}, "the sentence has no _"),
    ("arc_easy", {"question": "x", "choices": ["a"], "label": -1}, "-1 is not one of 1 choices"),
    ("arc_easy", {"question": "x"}, "expected question .or question_stem. and choices"),
    ("boolq", {"passage": "x", "question": 3, "answer": True}, "question is no text"),
    ("copa", {**LINES["copa"][1][0], "question": "why"}, "no 'why'; expected premise"),
    ("piqa", {"goal": "x", "sol1": "a", "sol2": "b"}, "no label, and no piqa_valid-labels.lst"),
])
def test_a_malformed_line_is_named(tmp_path, name, line, message):
  file, lines = LINES[name]
  good = {**lines[0], "label": lines[0].get("label", 0)}
  path = tmp_path / file.removesuffix(".gz")
  write_lines(path, [good, line])
  with pytest.raises(InputError, match=f"{path.name}, line 2 is not valid: .*{message}"):
    load_task(name, str(tmp_path))


def test_files_that_cannot_be_read_are_named(folder, tmp_path):
  with pytest.raises(InputError, match=r"--data = .* expected a folder with copa_dev.jsonl or"):
    load_task("copa", str(tmp_path))
  with pytest.raises(InputError, match=r"--data = .*expected a folder$"):
    load_task("copa", str(tmp_path / "none"))
  path = tmp_path / "copa_dev.jsonl"
  for content, message in (
      (b"{}\n", "line 1 is not valid"), (b"\n", "line 1 is not valid: it holds nothing"),
      (b"\n[1]\n", "line 2 is not valid: it is no object"),
      (b"{", "line 1 is not valid: Expecting"), (b"\n\xff", "line 2 is not valid: it is not UTF-8"),
  ):
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"copa_dev.jsonl, {message}"):
      load_task("copa", str(tmp_path))
  path.unlink()
  (tmp_path / "copa_dev.jsonl.gz").write_bytes(b"no gzip")
  with pytest.raises(InputError, match=r"copa_dev.jsonl.gz cannot be read"):
    load_task("copa", str(tmp_path))
  (tmp_path / "cloze_test_val__x.csv").write_text("InputStoryid\n1\n")
  with pytest.raises(InputError, match=r"val__x.csv, line 2 .*; expected columns InputSentence1"):
    load_task("storycloze", str(tmp_path))


def test_names_of_tasks():
  assert parse_names("piqa, lambada,", "--tasks") == ["piqa", "lambada"]
  for text in ("", "piqa,piqa", "pica"):
    with pytest.raises(InputError, match=r"--tasks = .*expected .*names of wikitext, lambada"):
      parse_names(text, "--tasks")


@pytest.mark.slow
def test_the_published_sets(folder):
  """Those that are beside the project, if they are: counts as they were published."""
  from tests.helpers import ROOT

  shared = next((ROOT / above / "shared" / "data" for above in ("..", "../..")
                 if (ROOT / above / "shared" / "data").is_dir()), None)
  counts = {"lambada": 5153, "hellaswag": 10042, "piqa": 1838, "winogrande": 1267,
            "arc_easy": 2376, "arc_challenge": 1172, "wikitext": 62}
  for name, count in counts.items():
    data = load_task(name, str(shared or folder), shots=2 if shared else 1)
    assert data.total == (count if shared else COUNTS[name])
    assert json.dumps([one.pairs for one in data.items])

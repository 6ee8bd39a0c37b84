"""Task files of lm-evaluation-harness for data of this machine.

A task file includes the harness's own definition, so that prompts, choices, gold answers and
metrics are the harness's code, and replaces its data set by local JSONL in the same schema.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from dense_jax.evaluation import harness
from dense_jax.evaluation.tasks import Record


@dataclasses.dataclass(frozen=True)
class Definition:
  """A task of the harness.

  Attributes:
    name: its name there.
    file: its definition below the harness's folder of tasks.
    split: the split that is evaluated.
  """

  name: str
  file: str
  split: str = "validation"


# What the harness calls "training" is the split "train" of its data sets.
_SPLITS = {"training": "train", "validation": "validation", "test": "test"}

# Our name -> the harness's task.
DEFINITIONS: dict[str, Definition] = {
    "wikitext": Definition("wikitext", "wikitext/wikitext.yaml", "test"),
    "lambada": Definition("lambada_openai", "lambada/lambada_openai.yaml", "test"),
    "hellaswag": Definition("hellaswag", "hellaswag/hellaswag.yaml"),
    "piqa": Definition("piqa", "piqa/piqa.yaml"),
    "winogrande": Definition("winogrande", "winogrande/default.yaml"),
    "arc_easy": Definition("arc_easy", "arc/arc_easy.yaml", "test"),
    "arc_challenge": Definition("arc_challenge", "arc/arc_challenge.yaml", "test"),
    "boolq": Definition("boolq", "super_glue/boolq/default.yaml"),
    "copa": Definition("copa", "super_glue/copa/default.yaml"),
    "openbookqa": Definition("openbookqa", "openbookqa/openbookqa.yaml", "test"),
    "storycloze": Definition("storycloze_2016", "storycloze/storycloze_2016.yaml", "test"),
}


def _choices(record: Record) -> dict[str, Any]:
  """Returns choices and answer as ARC and OpenBookQA have them."""
  labels = [chr(ord("A") + index) for index in range(len(record.choices))]
  return {"choices": {"text": record.choices, "label": labels}, "answerKey": labels[record.gold]}


def _arc(record: Record) -> dict[str, Any]:
  return {"question": record.fields["question"], **_choices(record)}


def _copa(record: Record) -> dict[str, Any]:
  first, second = (choice.removeprefix(" ") for choice in record.choices)
  return {
      "premise": record.fields["premise"] + ".", "choice1": first, "choice2": second,
      "question": {"because": "cause", "therefore": "effect"}[record.fields["connector"]],
      "label": record.gold,
  }


def _storycloze(record: Record) -> dict[str, Any]:
  # The harness joins the four parts by spaces, wherever the story was split at one.
  parts = record.fields["story"].split(" ", 3)
  return {
      **{f"input_sentence_{number}": part for number, part in enumerate(parts, 1)},
      "sentence_quiz1": record.choices[0], "sentence_quiz2": record.choices[1],
      "answer_right_ending": record.gold + 1,
  }


# Our name -> a record as a document of the harness's data set.
_DOCUMENTS: dict[str, Callable[[Record], dict[str, Any]]] = {
    "wikitext": lambda record: {"page": record.choices[0]},
    "lambada": lambda record: {"text": record.fields["passage"] + record.choices[0]},
    # As the task's own process_docs returns it.
    "hellaswag": lambda record: {
        "query": record.fields["query"], "choices": record.choices, "label": record.gold,
    },
    "piqa": lambda record: {
        "goal": record.fields["question"], "sol1": record.choices[0], "sol2": record.choices[1],
        "label": record.gold,
    },
    "winogrande": lambda record: {
        "sentence": f"{record.fields['before']}_ {record.fields['after']}",
        "option1": record.choices[0], "option2": record.choices[1], "answer": str(record.gold + 1),
    },
    "arc_easy": _arc,
    "arc_challenge": _arc,
    "boolq": lambda record: {**record.fields, "label": record.gold},
    "copa": _copa,
    "openbookqa": lambda record: {
        "question_stem": record.fields["question"], **_choices(record)
    },
    "storycloze": _storycloze,
}


def write_task(
    folder: pathlib.Path, task: str, records: Sequence[Record],
    examples: Sequence[Record] | None = None, *, first_shots: bool = False,
) -> str:
  """Writes a task file, and the documents beside it, into a folder that a `TaskManager` includes.

  Args:
    folder: an existing folder, where the data set's cache goes too.
    task: a key of `DEFINITIONS`.
    records: what is evaluated.
    examples: where the examples of few-shot prompts come from. None means `records`, where none is
      an example of its own prompt.
    first_shots: all prompts have the same examples, the first ones. False draws new ones for each
      prompt, as the harness does by default.

  Returns:
    The task's name in the harness.

  Raises:
    InputError: lm_eval is not installed.
  """
  definition = DEFINITIONS[task]
  # Examples are taken from the first of these splits that a task file has.
  others = "validation" if definition.split == "test" else "train"
  splits = {definition.split: records} | ({} if examples is None else {others: examples})
  files: dict[str, str] = {}
  for split, rows in splits.items():
    file = folder / f"{definition.name}.{split}.jsonl"
    with open(file, "w", encoding="utf-8") as out:
      for row in rows:
        out.write(json.dumps(_DOCUMENTS[task](row)) + "\n")
    files[split] = str(file)
  source = pathlib.Path(harness.require().__file__).parent / "tasks" / definition.file
  values: dict[str, Any] = {
      "include": str(source),
      "task": definition.name,
      "dataset_path": "json",
      "dataset_name": None,
      "dataset_kwargs": {"data_files": files, "cache_dir": str(folder / "cache")},
      **{f"{key}_split": split if split in files else None for key, split in _SPLITS.items()},
  }
  if set(files) == {"test"}:
    values["fewshot_split"] = "test"  # Only if it is named does the harness leave the document out.
  if task == "hellaswag":
    values["process_docs"] = None
  if task == "wikitext":
    values["num_fewshot"] = 0
  if first_shots:
    values["fewshot_config"] = {"sampler": "first_n"}
  # JSON is YAML.
  (folder / f"{definition.name}.yaml").write_text(json.dumps(values), encoding="utf-8")
  return definition.name

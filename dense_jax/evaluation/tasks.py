"""The tasks that a model is evaluated on: one table of prompts, choices and metrics.

The definitions are those of lm-evaluation-harness 0.4.13, its task files (`lm_eval/tasks`) and the
way in which its `ConfigurableTask` joins texts. docs/evaluation.md says how each number is defined.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence

from dense_jax.config import invalid

DEFINITIONS = "lm-evaluation-harness 0.4.13"
# Between a prompt and its answer, and after an example of a few-shot prompt.
_ANSWER, _NEXT = " ", "\n\n"


@dataclasses.dataclass(frozen=True)
class Task:
  """The definition of a task.

  Attributes:
    kind: what is scored.
      "choice": each of the choices after the prompt; the most probable one is the answer.
      "blank": the text after a blank, which each of the choices fills in turn.
      "word": the last word of a passage, which is right if each of its tokens is the most probable.
      "document": a whole document.
    prompt: the context, with fields of a record in braces.
    metrics: the numbers that are reported.
  """

  kind: str
  prompt: str
  metrics: tuple[str, ...]


_NORMALIZED = ("acc", "acc_norm", "acc_bytes")
_QUESTION = "Question: {question}\nAnswer:"

TASKS: Mapping[str, Task] = {
    "wikitext": Task("document", "", ("word_perplexity", "byte_perplexity", "bits_per_byte")),
    "lambada": Task("word", "{passage}", ("acc", "perplexity")),
    "hellaswag": Task("choice", "{query}", _NORMALIZED),
    "piqa": Task("choice", _QUESTION, _NORMALIZED),
    "winogrande": Task("blank", "{before}", ("acc",)),
    "arc_easy": Task("choice", _QUESTION, _NORMALIZED),
    "arc_challenge": Task("choice", _QUESTION, _NORMALIZED),
    "boolq": Task("choice", "{passage}\nQuestion: {question}?\nAnswer:", ("acc",)),
    "copa": Task("choice", "{premise} {connector}", ("acc",)),
    "openbookqa": Task("choice", "{question}", _NORMALIZED),
    "storycloze": Task("choice", "{story}", ("acc",)),
}


@dataclasses.dataclass(frozen=True)
class Record:
  """One line of a data file, whatever its format was.

  Attributes:
    fields: the texts that a prompt names.
    choices: the choices, or the one text that is scored.
    gold: the index of the right choice.
    name: the line's own id, or "".
  """

  fields: Mapping[str, str]
  choices: tuple[str, ...]
  gold: int = 0
  name: str = ""


@dataclasses.dataclass(frozen=True)
class Item:
  """The texts of a record that are scored.

  Attributes:
    name: the record's own id, or "".
    pairs: contexts and continuations.
    choices: the texts whose lengths normalise the scores; as many as `pairs`.
    gold: the index of the right pair.
  """

  name: str
  pairs: tuple[tuple[str, str], ...]
  choices: tuple[str, ...]
  gold: int


def parse_names(text: str, field: str) -> list[str]:
  """Returns the names of a list such as "lambada,piqa", in its order.

  Raises:
    InputError: a name is no task, occurs twice, or there is none.
  """
  names = [name.strip() for name in text.split(",") if name.strip()]
  unknown = next((name for name in names if name not in TASKS), None)
  if unknown is not None:
    raise invalid(field, unknown, f"names of {', '.join(TASKS)}, with commas between")
  if not names or len(set(names)) < len(names):
    raise invalid(field, text, f"different names of {', '.join(TASKS)}, with commas between")
  return names


def make_item(task: Task, record: Record, examples: Sequence[Record] = ()) -> Item:
  """Returns what is scored of a record, after the solved examples of a few-shot prompt."""
  shots = "".join(_solved(task, example) for example in examples)
  if task.kind == "document":
    return Item(record.name, (("", detokenized(record.choices[0])),), record.choices, 0)
  prompts = [shots + prompt for prompt in _prompts(task, record)]
  if task.kind == "blank":
    answers = [_ANSWER + record.fields["after"]] * len(prompts)
  elif task.kind == "word":
    answers = [*record.choices]
  else:
    prompts *= len(record.choices)
    answers = [_ANSWER + choice for choice in record.choices]
  return Item(record.name, tuple(zip(prompts, answers, strict=True)), record.choices, record.gold)


def _prompts(task: Task, record: Record) -> list[str]:
  """Returns the prompt, or one for each choice that fills the blank."""
  prompt = task.prompt.format_map(record.fields)
  if task.kind == "blank":
    return [prompt + choice for choice in record.choices]
  return [prompt]


def _solved(task: Task, record: Record) -> str:
  """Returns a record as an example of a few-shot prompt."""
  prompts = _prompts(task, record)
  if task.kind == "blank":
    return prompts[record.gold] + _ANSWER + record.fields["after"] + _NEXT
  return prompts[0] + _ANSWER + record.choices[record.gold] + _NEXT


def count_words(page: str) -> int:
  """Returns the number of parts between white space of a WikiText page, as it is in the file.

  White space at an end adds one, the empty part beyond it.
  """
  return len(re.split(r"\s+", page))


_REPLACED = (
    (" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."), (" : ", ": "), (" ; ", "; "), (" . ", ". "),
    (" ! ", "! "), (" ? ", "? "), (" , ", ", "),
)
_WITHIN = (
    (r"\(\s*([^\)]*?)\s*\)", r"(\1)"), (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
    (r"{\s*([^}]*?)\s*}", r"{\1}"), (r"\"\s*([^\"]*?)\s*\"", r'"\1"'),
    (r"'\s*([^']*?)\s*'", r"'\1'"),
)
_HEADINGS_AND_SPACES = (
    ("= = = =", "===="), ("= = =", "==="), ("= =", "=="), (" \u00b0 ", "\u00b0"), (" \n", "\n"),
    ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s"),
)


def detokenized(page: str) -> str:
  """Returns a WikiText page as ordinary text, by the harness's rules in its order."""
  page = page.replace("s '", "s'")
  page = re.sub(r"/' [0-9]/", r"/'[0-9]/", page)
  for old, new in _REPLACED:
    page = page.replace(old, new)
  for pattern, replacement in _WITHIN:
    page = re.sub(pattern, replacement, page)
  for old, new in _HEADINGS_AND_SPACES:
    page = page.replace(old, new)
  return page

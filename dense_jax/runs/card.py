"""The model card of a published model: README.md in its folder."""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from dense_jax.config import ExperimentConfig
from dense_jax.data.templates import parse_template
from dense_jax.evaluation.perplexity import fixed
from dense_jax.formatting import markdown_table, printable
from dense_jax.interop import dense_retnet, native

CARD_FILE = "README.md"
_FAMILIES = {
    "mamba": "Mamba", "mamba2": "Mamba-2", "s4": "S4", "s4d": "S4D", "retnet": "RetNet",
    "gau_retnet": "RetNet with gated attention units", "transformer": "transformer",
}


def model_card(
    record: Mapping[str, Any], config: ExperimentConfig, layout: str, parameters: int,
    files: Collection[str],
) -> str:
  """Returns a model card in Markdown.

  Args:
    record: the content of `training.json` (`dense_jax.runs.publishing`).
    config: its configuration.
    layout: the name of the folder's layout (`dense_jax.interop.save_hf`).
    parameters: their number.
    files: the names of the tokenizer's files.
  """
  with_transformers = layout not in (native.NAME, dense_retnet.NAME)
  sections = [
      _front_matter(config, with_transformers),
      f"# {_title(config)}, {parameters:,} parameters",
      _about(config, record, files),
      "## Loading", _loading(layout, with_transformers, files),
      "## Training", _training(record, config),
      "## Evaluation", _evaluation(record, config),
      "## Limits", _limits(record, config, layout),
  ]
  if record["step"]:
    text = json.dumps(record["config"], indent=2)
    sections += ["## Configuration", f"```json\n{text}\n```"]
  return printable("\n\n".join(sections)) + "\n"


def _front_matter(config: ExperimentConfig, with_transformers: bool) -> str:
  return "\n".join([
      "---",
      f"library_name: {'transformers' if with_transformers else 'dense_jax'}",
      "pipeline_tag: text-generation",
      "tags:", "- dense_jax", f"- {config.model.family}",
      *(["- dense-hidden-connections"] if config.model.dense.depth else []),
      "---",
  ])


def _title(config: ExperimentConfig) -> str:
  name = _FAMILIES.get(config.model.family, config.model.family)
  dense = config.model.dense
  if not dense.depth:
    return f"{name} language model"
  return f"{name} language model with dense connections, m = {dense.depth}"


def _about(
    config: ExperimentConfig, record: Mapping[str, Any], files: Collection[str]
) -> str:
  model, dense = config.model, config.model.dense
  rows = [
      ("family", model.family), ("layers", model.layers), ("width", model.width),
      ("tokenizer", f"{_tokenizer(files)}, {model.vocab_size:,} rows of the embedding"),
  ]
  if dense.depth:
    rows.append(("dense connections (arXiv 2403.00818)", ", ".join(
        f"{key} {getattr(dense, key)}"
        for key in ("depth", "inject", "fusion", "transition", "gate", "gate_sharing")
    )))
  if record["step"]:
    rows.append(("numbers", _numbers(record, config)))
  return _table(("", ""), rows)


def _tokenizer(files: Collection[str]) -> str:
  if "tokenizer.json" in files:
    return "`tokenizer.json` of the tokenizers library"
  return "SentencePiece" if "tokenizer.model" in files else "bytes of UTF-8"


def _numbers(record: Mapping[str, Any], config: ExperimentConfig) -> str:
  """Says which of a run's parameters they are."""
  parameters = record["parameters"]
  if parameters == "raw":
    return f"float32, after step {record['step']:,}"
  if parameters == "ema":
    return (
        f"float32, exponential moving average after step {record['step']:,}, decay "
        f"{config.train.ema:g}"
    )
  return f"float32, {parameters}"


def _loading(layout: str, with_transformers: bool, files: Collection[str]) -> str:
  ours = """\
With dense_jax, where `FOLDER` is this folder:

    dense-jax evaluate --hf FOLDER --text 'text/*.txt'
    dense-jax generate --hf FOLDER --prompt 'Once'
    dense-jax convert --hf FOLDER --output runs/from_folder
    dense-jax train --init-from FOLDER --workdir runs/tuned --config.data.path='text/*.txt'

or in Python, `runs.load_folder("FOLDER")` of `from dense_jax import runs`: a model with its
tokenizer."""
  if with_transformers:
    has_tokenizer = "tokenizer.json" in files
    theirs = """\
With transformers:

    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained("FOLDER")"""
    if has_tokenizer:
      theirs += """

`AutoTokenizer` reads `tokenizer.json`. Put the id of bos (`config.json`) before the ids of a text
where it does not do so itself: every text of training begins with it."""
    else:
      theirs += """

The tokenizer is not one of that library's: its input is the id of bos (`config.json`) and then the
ids that the tokenizer of `tokenizer_config.json` gives for a text."""
    return f"{theirs}\n\n{ours}"
  if layout == dense_retnet.NAME:
    return (
        "With the authors' code of DenseRetNet, `modeling_dense_gau_retnet.py` beside these files, "
        f"and `trust_remote_code=True` in transformers.\n\n{ours}"
    )
  return f"{ours}\n\nNo other library computes this model."


def _training(record: Mapping[str, Any], config: ExperimentConfig) -> str:
  if not record["step"]:
    return "Not known here: the model came from another folder, which does not say."
  train, optimizer = config.train, config.optimizer
  tokens = record["step"] * train.batch_size * config.data.seq_len
  rows = [
      ("steps", f"{record['step']:,} of {train.steps:,}"),
      ("tokens", f"{tokens:,}, in rows of {config.data.seq_len:,}, {train.batch_size:,} a step"),
      ("optimizer", f"AdamW, learning rate {optimizer.learning_rate:g}, {optimizer.schedule}, "
       f"weight decay {optimizer.weight_decay:g}"),
      ("dtype of activations", config.model.dtype),
      ("seed", config.seed),
      *_data_rows(record, config),
  ]
  text = _table(("", ""), rows)
  init = record["init"]
  if isinstance(init, Mapping):
    text += (
        f"\n\nTraining began with the parameters of another model, {_code(init.get('model'))}, "
        "whose tokenizer this one has."
    )
  template = _template(record)
  if template is not None:
    text += (
        "\n\nThe template of prompts (`config.data.template`) is the following. A prompt has to be "
        "put into it, after the token bos, before the model can answer.\n\n"
        f"{_indented(template)}"
    )
  return text


def _template(record: Mapping[str, Any]) -> str | None:
  """Returns the template of prompts of a model that was trained on responses, else None."""
  data = record["config"].get("data")
  if not isinstance(data, Mapping) or data.get("format") != "responses":
    return None
  return parse_template(str(data.get("template"))).prompt("{prompt}")


def _indented(text: str) -> str:
  """Returns text as a Markdown code block, which nothing in it can end."""
  return "\n".join(f"    {line}" for line in text.splitlines())


def _data_rows(record: Mapping[str, Any], config: ExperimentConfig) -> Iterator[tuple[str, Any]]:
  if config.data.task.exists:
    yield "synthetic task", _code(config.data.task.name)
  else:
    yield "text", _code(config.data.path)
  template = _template(record)
  if template is not None:
    yield "trained on", "responses alone, to prompts in the template below"
  data = record["data"]
  if not isinstance(data, Mapping):
    return
  yield "fingerprint of text and tokenizer", _code(data.get("fingerprint"))
  yield "fingerprint of the tokenizer", _code(data.get("tokenizer"))
  files = data.get("files")
  for field, described in (files if isinstance(files, Mapping) else {}).items():
    if isinstance(described, Mapping):
      count, size = (_number(described.get(key)) for key in ("count", "bytes"))
      digest = _code(described.get("digest"))
      yield f"files of `{field}`", f"{count}, {size} bytes, digest {digest}"


def _evaluation(record: Mapping[str, Any], config: ExperimentConfig) -> str:
  evaluation, heldout = record["evaluation"], record["heldout"]
  if evaluation:
    return "\n\n".join(evaluation_table(each) for each in evaluation)
  if not isinstance(heldout, Mapping):
    return "None was made of these parameters."
  rows = [(name.replace("_", " "), _number(value)) for name, value in heldout.items()]
  what = "rows" if config.data.task.exists else "text"
  return (
      f"Held-out {what} of the training run, a part of it (`train.eval_batches`), in windows of "
      f"{config.data.seq_len:,} tokens with a fresh context each. The loss is in nats per token."
      "\n\n"
      + _table(("", ""), rows)
  )


def evaluation_table(evaluation: Mapping[str, Any]) -> str:
  """Returns the figures of a file that `evaluate --json` wrote, as a Markdown table.

  The file has either the figures of a text, or, under `tasks`, the metrics of tasks.
  """
  tasks = evaluation.get("tasks")
  if isinstance(tasks, Mapping):
    return _tasks_table(evaluation, tasks)
  rows = [
      (key.replace("_", " "), _number(value)) for key, value in evaluation.items()
      if not isinstance(value, Mapping | list)
  ]
  return _table(("", ""), rows)


def is_evaluation(content: Any) -> bool:
  """Returns whether JSON values have the form of an evaluation, of a text or of tasks."""
  if not isinstance(content, Mapping) or "tasks" not in content:
    return isinstance(content, Mapping) and "loss" in content
  try:
    return all(
        "shots" in task and "items" in task["counts"]
        and all({"value", "stderr"} <= found.keys() for found in task["metrics"].values())
        for task in content["tasks"].values()
    )
  except (AttributeError, KeyError, TypeError):
    return False


def _tasks_table(evaluation: Mapping[str, Any], tasks: Mapping[str, Any]) -> str:
  rows = []
  for task, figures in tasks.items():
    first: tuple[Any, ...] = task, figures["shots"], _number(figures["counts"]["items"])
    for metric, found in figures["metrics"].items():
      error = found["stderr"]
      rows.append((*first, metric, _number(found["value"]),
                   "" if error is None else _number(error)))
      first = "", "", ""
  versions = evaluation.get("versions")
  definitions = versions.get("tasks") if isinstance(versions, Mapping) else "dense_jax"
  head = ("task", "shots", "items", "metric", "value", "standard error")
  return (
      f"Tasks as in {definitions}; context: {evaluation.get('context')}.\n\n{_table(head, rows)}"
  )


def _limits(record: Mapping[str, Any], config: ExperimentConfig, layout: str) -> str:
  limits = [
      "It continues text of the kind that it was trained on. What it says may be false, offensive "
      "or private, as that text may be: nothing was done against it.",
  ]
  if record["step"]:
    limits.append(
        f"It was trained on rows of {config.data.seq_len:,} tokens, and what it does beyond them "
        "was not measured in training."
    )
  if config.model.family == "transformer":
    limits.append(f"It attends to the last {config.model.mixer.context:,} tokens.")
  if layout == native.NAME:
    limits.append("Only dense_jax can load it.")
  return "\n".join(f"- {limit}" for limit in limits)


def _number(value: Any) -> str:
  if isinstance(value, bool) or not isinstance(value, int | float):
    return str(value)
  if isinstance(value, int):
    return f"{value:,}"
  return fixed(value, 4)


def _code(text: Any) -> str:
  """Returns text in backticks, on one line."""
  return f"`{' '.join(str(text).replace('`', '').split())}`"


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
  """Returns a table in Markdown whose columns are all words."""
  return markdown_table([head, *rows], slice(0))

"""Scores a model on tasks from local files, or on held-out text."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from etils import epath

from dense_jax import runs
from dense_jax.cli import common
from dense_jax.config import invalid
from dense_jax.data.sources import find
from dense_jax.files import is_remote
from dense_jax.outputs import check_file, write_json, write_json_lines
from dense_jax.runs import harness, tasks

_EPILOG = """
With --tasks it prints a table of the tasks' metrics with their standard errors. docs/evaluation.md
defines them and names the files of --data. The scores do not depend on the batch size. With --json,
an evaluation that was stopped goes on when the same command is given again.

With --harness too, lm-evaluation-harness (lm_eval) makes the prompts and counts; without network.
Each prompt then has examples of its own, which it draws.

Without --tasks it scores held-out text. The text is read in windows of config.data.seq_len tokens,
one after the other, and the state is cleared at the beginning of each (and of each document): the
context is fresh every seq_len tokens, and a target is predicted from the tokens before it in its
own window. A run of longer windows predicts from more. Of a run with a synthetic task it scores the
held-out rows, and says how many answers are right.
"""
# Options that need --tasks, by their names there and in the parsed options.
_OF_TASKS = ("data", "limit", "shots", "context", "items", "harness", "include_path")


def main(arguments: Sequence[str]) -> int:
  """Prints the scores on tasks, or the held-out loss, and writes them with --json."""
  options = _parse(arguments)
  file = None if options.json is None else check_file(options.json, "--json")
  if options.tasks is None:
    return _evaluate_text(options, file)
  if options.harness:
    return _evaluate_by_harness(options, file)
  return _evaluate_tasks(options, file)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
  command = common.parser("evaluate", "A model's scores on tasks, or on held-out text.")
  command.epilog = _EPILOG
  common.add_model_arguments(command)
  common.add_strict_argument(command)
  command.add_argument("--tasks", metavar="NAME,...", help=f"of {', '.join(tasks.NAMES)}")
  command.add_argument("--data", metavar="DIR", help="the folder that has the tasks' files")
  command.add_argument("--shots", type=int, metavar="K",
                       help="solved examples in each prompt (default 0)")
  command.add_argument("--limit", type=int, metavar="N",
                       help="score the first N items of each task; default all")
  command.add_argument("--context", choices=("carried", "fresh"),
                       help="carried (default): contexts and documents of any length are read, and "
                       "the state is carried over them; fresh: only the last tokens, as many as "
                       "the rows of training had, and documents in windows of that length")
  command.add_argument("--items", metavar="FILE", help="write the scores of each item there, one "
                       "a line")
  command.add_argument("--harness", action="store_const", const=True,
                       help="evaluate by lm-evaluation-harness; pip install -e '.[eval]'")
  command.add_argument("--include-path", metavar="DIR", help="a folder of further task files of "
                       "the harness, whose tasks --tasks may name too")
  command.add_argument("--text", help="score this text (a file, directory or glob) instead of the "
                       "run's own held-out text")
  command.add_argument("--batch-size", type=int, default=16,
                       help="rows at a time (default 16); more than there are take all")
  command.add_argument("--json", metavar="FILE", help="write the figures there; one that is not "
                       "finite is null")
  options = command.parse_args(arguments)
  for name in (*_OF_TASKS, "text"):
    needed = "no value with --tasks" if name == "text" else "no value without --tasks"
    if getattr(options, name) is not None and (options.tasks is None) == (name != "text"):
      raise invalid(f"--{name.replace('_', '-')}", getattr(options, name), needed)
  if options.include_path is not None and not options.harness:
    raise invalid("--include-path", options.include_path, "no value without --harness")
  for name, low in (("batch_size", 1), ("limit", 1), ("shots", 0)):
    value = getattr(options, name)
    if value is not None and value < low:
      raise invalid(f"--{name.replace('_', '-')}", value, f"an integer >= {low}")
  return options


def _evaluate_text(options: argparse.Namespace, file: epath.Path | None) -> int:
  text = None if options.text is None else find(options.text, "--text")
  model = common.load_model(options)
  score = runs.evaluate_run(model, text, batch_size=options.batch_size)
  held_out = score.held_out
  known = {"step": model.step} if isinstance(model, runs.Run) else {"model": model.name}
  name = f"step {model.step}" if isinstance(model, runs.Run) else model.name
  print(f"{name}: {score.describe()}")
  if file is not None:
    figures = {
        **known,
        "loss": held_out.loss,
        "perplexity": held_out.perplexity,
        "bits_per_byte": score.bits_per_byte,
        "targets": held_out.targets,
        "bytes": score.num_bytes,
        "window": held_out.window,
        "context": held_out.context,
        **({"answers": dict(score.answers)} if score.answers else {}),
    }
    write_json(file, figures, "--json")
  return 0


def _evaluate_tasks(options: argparse.Namespace, file: epath.Path | None) -> int:
  if options.data is None:
    raise invalid("--data", None, "a folder that has the tasks' files")
  items = None if options.items is None else check_file(options.items, "--items")
  data = tasks.load_tasks(
      options.tasks, options.data, shots=options.shots or 0, limit=options.limit or 0
  )
  model = common.load_model(options)
  partial = None
  if file is not None and not is_remote(file):
    partial = Path(file.with_name(file.name + ".partial"))
  report = runs.evaluate_tasks(
      model, data, batch_size=options.batch_size, carried=options.context != "fresh",
      partial=partial,
  )
  print(f"{report.describe()}\n\n{report.table()}")
  if items is not None:
    write_json_lines(items, report.item_lines(), "--items")
  if file is not None:
    write_json(file, report.figures(), "--json")
  if partial is not None:
    partial.unlink(missing_ok=True)
  return 0


def _evaluate_by_harness(options: argparse.Namespace, file: epath.Path | None) -> int:
  items = None if options.items is None else check_file(options.items, "--items")
  names = harness.check_tasks(options.tasks, options.data, options.include_path)
  model = common.load_model(options)
  results = harness.run_harness(
      harness.harness_model(
          model, batch_size=options.batch_size, carried=options.context != "fresh"
      ),
      names, data=options.data, include_path=options.include_path, limit=options.limit,
      shots=options.shots, samples=items is not None,
  )
  print(harness.table(results))
  if items is not None:
    write_json_lines(items, harness.item_lines(results), "--items")
  if file is not None:
    write_json(file, harness.summary(results), "--json")
  return 0


if __name__ == "__main__":
  common.run(main)

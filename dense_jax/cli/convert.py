"""Writes a run's model as a Hugging Face style folder, and a run of such a folder."""

import argparse
import pathlib
from collections.abc import Sequence
from typing import Any

from dense_jax import runs
from dense_jax.cli import common
from dense_jax.config import invalid
from dense_jax.errors import InputError
from dense_jax.files import parse_json
from dense_jax.outputs import check_destination
from dense_jax.runs.card import is_evaluation

_ABOUT = """\
With --workdir, writes a run's model to a folder with config.json and model.safetensors, which
dense_jax loads, and transformers too where it has such a model; with its tokenizer, a model card
(README.md) and what the card is made from (training.json).
With --hf, does the opposite: makes a run's folder of a model in a Hugging Face layout. The run has
one checkpoint, of step 0, which can be evaluated, sampled from and trained from (--init-from)."""


def main(arguments: Sequence[str]) -> int:
  """Converts, and prints what was written where."""
  command = common.parser("convert", _ABOUT)
  common.add_model_arguments(command)
  command.add_argument(
      "--output", required=True, help="the folder to write: a new or an empty one"
  )
  command.add_argument(
      "--average", type=int, metavar="K", help="take the mean of the K newest checkpoints that the "
      "run has kept, instead of one"
  )
  command.add_argument(
      "--evaluation", metavar="FILE", action="append", default=[], help="put the figures of this "
      "file, from evaluate --json, into the card instead of the held-out loss of training; may be "
      "repeated"
  )
  options = command.parse_args(arguments)
  folder = str(check_destination(options.output, "--output"))
  if options.hf is not None:
    common.check_no_choice(options)
    for name in ("average", "evaluation"):
      if getattr(options, name) not in (None, []):
        raise invalid(f"--{name}", getattr(options, name), "no value with --hf, which is one model")
    made = runs.make_run(options.hf, folder)
    print(f"{made.parameters:,} parameters of {options.hf} as a run, step 0, in {made.folder}")
    return 0
  evaluation = [_read_evaluation(file) for file in options.evaluation]
  run, mean_of = _load(options)
  made = runs.publish(run, options.workdir, folder, evaluation=evaluation, mean_of=mean_of)
  what = f"step {run.step}" + (", averaged (ema)" if run.weights == "ema" else "")
  if mean_of:
    what = f"mean of steps {', '.join(map(str, mean_of))}"
  print(f"{what}: {made.parameters:,} parameters in {made.folder}, layout: {made.layout}")
  return 0


def _load(options: argparse.Namespace) -> tuple[runs.Run, list[int]]:
  if options.average is None:
    run = runs.restore(options.workdir, options.checkpoint, options.weights, runs_model=False)
    return run, []
  if options.checkpoint != "latest":
    raise invalid("--checkpoint", options.checkpoint, "no value with --average, which takes the "
                  "newest ones")
  if options.weights == "ema":
    raise invalid("--weights", options.weights, "raw or no value with --average, which is a mean "
                  "of the parameters that were trained")
  return runs.average_checkpoints(options.workdir, options.average)


def _read_evaluation(path: str) -> dict[str, Any]:
  valid = "a JSON file that evaluate --json wrote"
  try:
    content = parse_json(pathlib.Path(path).expanduser().read_bytes())
  except OSError as error:
    raise invalid("--evaluation", path, f"{valid} ({error.strerror})") from error
  except ValueError as error:
    raise InputError(f"--evaluation = {path!r} is not valid: expected {valid} ({error})") from error
  if not is_evaluation(content):
    raise invalid("--evaluation", path, f"{valid}; it holds something else")
  return content


if __name__ == "__main__":
  common.run(main)

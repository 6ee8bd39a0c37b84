"""Writes a trained run as a Hugging Face style checkpoint."""

from collections.abc import Sequence

from dense_jax.cli import common
from dense_jax.interop.save import check_destination, save_hf
from dense_jax.models.params import count_params, with_params


def main(arguments: Sequence[str]) -> int:
  """Saves a checkpoint of the run, and says in which layout."""
  command = common.parser(
      "convert",
      "Writes a run's checkpoint to a folder with config.json and model.safetensors, which\n"
      "dense_jax.interop.load_hf loads, and transformers too where it has such a model.",
  )
  common.add_checkpoint_arguments(command)
  command.add_argument(
      "--output", required=True, help="the folder to write: a new or an empty one"
  )
  options = command.parse_args(arguments)
  check_destination(options.output, "--output")

  run = common.restore(options.workdir, options.checkpoint)
  tokenizer = run.tokenizer
  layout = save_hf(
      with_params(run.model, run.params), options.output,
      bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id,
  )
  size = count_params(run.params)
  print(f"step {run.step}: {size:,} parameters in {options.output}, layout: {layout}")
  return 0


if __name__ == "__main__":
  common.run(main)

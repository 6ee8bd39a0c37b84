"""Writes a trained run as a Hugging Face style checkpoint."""

from collections.abc import Sequence

from dense_jax import runs
from dense_jax.cli import common
from dense_jax.data.converted import converted_files
from dense_jax.interop.save import save_hf
from dense_jax.models.params import count_params
from dense_jax.outputs import check_destination


def main(arguments: Sequence[str]) -> int:
  """Saves a checkpoint of the run, and prints its step, size, folder and layout."""
  command = common.parser(
      "convert",
      "Writes a run's checkpoint to a folder with config.json and model.safetensors, which\n"
      "dense_jax.interop.load_hf loads, and transformers too where it has such a model; with\n"
      "its tokenizer: tokenizer_config.json, and tokenizer.model if it is of SentencePiece.",
  )
  common.add_checkpoint_arguments(command)
  command.add_argument(
      "--output", required=True, help="the folder to write: a new or an empty one"
  )
  options = command.parse_args(arguments)
  folder = check_destination(options.output, "--output")

  run = runs.restore(options.workdir, options.checkpoint)
  tokenizer = run.tokenizer
  layout = save_hf(
      run.model, str(folder), bos_token_id=tokenizer.bos_id,
      eos_token_id=tokenizer.eos_id, files=converted_files(tokenizer),
  )
  size = count_params(run.params)
  print(f"step {run.step}: {size:,} parameters in {folder}, layout: {layout}")
  return 0


if __name__ == "__main__":
  common.run(main)

"""Continues prompts with a trained run."""

from collections.abc import Sequence

from dense_jax.cli import common
from dense_jax.config import invalid
from dense_jax.generation.decode import Generator
from dense_jax.generation.sampling import Sampling
from dense_jax.models.params import with_params


def main(arguments: Sequence[str]) -> int:
  """Prints each prompt with its continuation."""
  command = common.parser("generate", "Samples continuations of prompts from a run.")
  common.add_checkpoint_arguments(command)
  command.add_argument(
      "--prompt", action="append", required=True, help="text to continue; may be repeated"
  )
  command.add_argument("--max-new-tokens", type=int, default=128, help="default 128")
  command.add_argument("--temperature", type=float, default=0.8, help="0 is greedy; default 0.8")
  command.add_argument("--top-k", type=int, default=0, help="0 is all (default)")
  command.add_argument("--top-p", type=float, default=1.0, help="default 1")
  command.add_argument("--seed", type=int, default=0, help="default 0")
  options = command.parse_args(arguments)
  if options.max_new_tokens < 1:
    raise invalid("--max-new-tokens", options.max_new_tokens, "an integer >= 1")
  sampling = Sampling(options.temperature, options.top_k, options.top_p)

  run = common.restore(options.workdir, options.checkpoint)
  tokenizer = run.tokenizer
  prompts = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in options.prompt]
  generator = Generator(with_params(run.model, run.params), sampling)
  continuations = generator(
      prompts, max_new_tokens=options.max_new_tokens, seed=options.seed,
      stop_id=tokenizer.eos_id,
  )
  for prompt, continuation in zip(options.prompt, continuations, strict=True):
    print(prompt + tokenizer.decode(continuation))
    if len(prompts) > 1:
      print("-" * 72)
  return 0


if __name__ == "__main__":
  common.run(main)

"""Continues prompts with a trained run."""

from collections.abc import Sequence

from dense_jax import runs
from dense_jax.cli import common
from dense_jax.config import LARGEST_SEED, invalid
from dense_jax.data.spelling import spell
from dense_jax.generation.decode import Generator
from dense_jax.generation.sampling import Sampling
from dense_jax.runs.formatting import printable

# All new tokens are held in memory until they are printed.
_MOST_NEW_TOKENS = 10**6
_EPILOG = """
What is printed is the text that the run's tokenizer spells for the tokens of the prompt and of its
continuation together. A tokenizer that changes text (as T5's does, with spaces and forms of
letters) prints the prompt as it reads it. Control characters are printed as U+FFFD.
"""


def main(arguments: Sequence[str]) -> int:
  """Prints each prompt with its continuation."""
  command = common.parser("generate", "Samples continuations of prompts from a run.")
  command.epilog = _EPILOG
  common.add_checkpoint_arguments(command)
  command.add_argument(
      "--prompt", action="append", required=True,
      help="text to continue, UTF-8; '' begins a document; may be repeated"
  )
  command.add_argument("--max-new-tokens", type=int, default=128, help="default 128")
  command.add_argument("--temperature", type=float, default=0.8, help="0 is greedy; default 0.8")
  command.add_argument("--top-k", type=int, default=0, help="0 is all (default)")
  command.add_argument("--top-p", type=float, default=1.0, help="default 1")
  command.add_argument("--seed", type=int, default=0, help="from 0 to 2**32 - 1; default 0")
  options = command.parse_args(arguments)
  if not 1 <= options.max_new_tokens <= _MOST_NEW_TOKENS:
    raise invalid(
        "--max-new-tokens", options.max_new_tokens, f"an integer from 1 to {_MOST_NEW_TOKENS}"
    )
  if not 0 <= options.seed <= LARGEST_SEED:
    raise invalid("--seed", options.seed, f"an integer from 0 to {LARGEST_SEED}")
  for prompt in options.prompt:
    _check_text(prompt)
  sampling = Sampling(options.temperature, options.top_k, options.top_p)

  run = runs.restore(options.workdir, options.checkpoint)
  tokenizer = run.tokenizer
  texts = [tokenizer.encode(prompt) for prompt in options.prompt]
  generator = Generator(run.model, sampling)
  continuations = generator(
      [[tokenizer.bos_id, *ids] for ids in texts],
      max_new_tokens=options.max_new_tokens, seed=options.seed, stop_id=tokenizer.eos_id,
  )
  for ids, new_ids in zip(texts, continuations, strict=True):
    print(printable("".join(spell(tokenizer, ids, new_ids))))
    if len(texts) > 1:
      print("-" * 72)
  return 0


def _check_text(prompt: str) -> None:
  """Refuses bytes that are not UTF-8, which Python represents as lone surrogates."""
  try:
    prompt.encode()
  except UnicodeEncodeError as error:
    raise invalid("--prompt", prompt, "text in UTF-8") from error


if __name__ == "__main__":
  common.run(main)

"""Continues prompts with a trained run or a model in a Hugging Face layout."""

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from dense_jax.cli import common
from dense_jax.config import LARGEST_SEED, invalid
from dense_jax.errors import InputError
from dense_jax.formatting import printable
from dense_jax.generation.generator import BATCH_SIZE, Generator
from dense_jax.generation.requests import Prefix, Result
from dense_jax.generation.sampling import Sampling
from dense_jax.generation.state_file import StateFiles, params_fingerprint
from dense_jax.generation.text import Spelling
from dense_jax.interrupt import Break
from dense_jax.outputs import check_file
from dense_jax.runs import generating
from dense_jax.runs.generating import MOST_NEW_TOKENS, SHOWN_TOKENS, Prompt, Settings
from dense_jax.runs.restoring import LoadedModel

_EPILOG = """
What is printed is the text that the run's tokenizer spells for the tokens of the prompt and of its
continuation together. A tokenizer that changes text (as T5's does, with spaces and forms of
letters) prints the prompt as it reads it. Control characters are printed as U+FFFD.

A model that was tuned on responses is given each prompt in its template, and each later one of a
conversation, or after --from-state, behind the end of the response before it.

A line of --prompts is a JSON object: "prompt", and optionally "id" (copied), "max_new_tokens",
"temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed" and "stop" (a text or a list
of texts), which else are those of the command line. docs/generation.md says what each one means.
"""


def main(arguments: Sequence[str]) -> int:
  """Prints each prompt with its continuation, writes those of a file, or holds a conversation."""
  command = common.parser("generate", "Samples continuations of prompts.")
  command.epilog = _EPILOG
  common.add_model_arguments(command)
  common.add_strict_argument(command)
  texts = command.add_mutually_exclusive_group()
  texts.add_argument(
      "--prompt", action="append",
      help="text to continue, UTF-8; '' begins a document; may be repeated",
  )
  texts.add_argument("--prompts", metavar="F.jsonl", help="a file of prompts, one in each line")
  texts.add_argument(
      "--interactive", action="store_true",
      help="continue what is typed, line by line; Ctrl-C ends an answer, Ctrl-D the conversation",
  )
  command.add_argument("--output", metavar="F.jsonl",
                       help="write the continuations to this file, instead of printing them")
  command.add_argument("--log-probs", action="store_true",
                       help="with --output or --prompts: ids and log-probabilities of new tokens")
  command.add_argument(
      "--max-new-tokens", type=int, default=128, help="default 128; 0 with --save-state only reads")
  command.add_argument("--temperature", type=float, default=0.8, help="0 is greedy; default 0.8")
  command.add_argument("--top-k", type=int, default=0, help="0 is all (default)")
  command.add_argument("--top-p", type=float, default=1.0, help="default 1")
  command.add_argument("--min-p", type=float, default=0.0, help="default 0")
  command.add_argument("--repetition-penalty", type=float, default=1.0, help="1 is none (default)")
  command.add_argument("--seed", type=int, default=0, help="from 0 to 2**32 - 1; default 0")
  command.add_argument("--stop", action="append", default=[], metavar="TEXT",
                       help="text before which a continuation ends; may be repeated")
  command.add_argument("--save-state", metavar="F",
                       help="write the state after the one prompt, or conversation, to this file")
  command.add_argument("--from-state", metavar="F",
                       help="go on from a state that --save-state wrote; needs no prompt")
  command.add_argument("--no-template", action="store_true",
                       help="continue prompts as they are, though the model was taught to answer "
                       "them in a template (config.data.template)")
  command.add_argument("--state-dtype", choices=("float32", "bfloat16"),
                       help="dtype of kept states; default config.model.state_dtype")
  command.add_argument(
      "--batch-size", type=int,
      help=f"texts decoded together: default {BATCH_SIZE}, and 1 with --interactive")
  options = command.parse_args(arguments)
  settings, prompts = _check(options)

  model = common.load_model(options)
  if options.no_template:
    model = dataclasses.replace(model, template=None)
  if options.state_dtype:
    model = generating.with_state_dtype(model, options.state_dtype)
  batch_size = options.batch_size or (1 if options.interactive else BATCH_SIZE)
  generator = Generator(model.model, model.tokenizer, batch_size=batch_size)
  files = StateFiles(model.name, model.model, model.tokenizer)
  prefix = files.load(options.from_state, "--from-state") if options.from_state else None
  if options.interactive:
    prefix = _converse(generator, model, settings, prefix)
  elif options.prompts or options.output:
    _write(options, generator, model, prompts, prefix)
    return 0
  else:
    prefix = _print(options, generator, model, prompts, prefix)
  if options.save_state:
    if prefix is None:
      raise InputError("--save-state: nothing was read, so there is no state to save")
    files.save(prefix, options.save_state, "--save-state")
  return 0


def _check(options: argparse.Namespace) -> tuple[Settings, list[Prompt]]:
  """Checks all arguments, and that files can be written; returns settings and prompts.

  Raises:
    InputError: an argument is not valid, or does not go with another one.
  """
  least = 0 if options.save_state else 1
  if not least <= options.max_new_tokens <= MOST_NEW_TOKENS:
    raise invalid(
        "--max-new-tokens", options.max_new_tokens, f"an integer from {least} to {MOST_NEW_TOKENS}"
    )
  if not 0 <= options.seed <= LARGEST_SEED:
    raise invalid("--seed", options.seed, f"an integer from 0 to {LARGEST_SEED}")
  if options.batch_size is not None and options.batch_size < 1:
    raise invalid("--batch-size", options.batch_size, "an integer >= 1")
  for name, texts in (("--prompt", options.prompt or []), ("--stop", options.stop)):
    for text in texts:
      generating.check_text(text, name)
  sampling = Sampling(
      options.temperature, options.top_k, options.top_p, options.min_p, options.repetition_penalty
  )
  settings = Settings(sampling, options.max_new_tokens, options.seed, tuple(options.stop))
  if not (options.prompt or options.prompts or options.interactive or options.from_state):
    raise InputError("no text: expected --prompt, --prompts, --interactive or --from-state")
  if options.output and options.interactive:
    raise invalid("--output", options.output, "no value with --interactive, which prints")
  if options.log_probs and not (options.output or options.prompts):
    raise InputError("--log-probs needs --output or --prompts, which write them")
  for name, file in (("--output", options.output), ("--save-state", options.save_state)):
    if file:
      check_file(file, name)
  if options.prompts:
    prompts = generating.read_prompts(options.prompts, "--prompts", settings)
  else:
    # Without a prompt, the state's text itself goes on.
    texts = [] if options.interactive else options.prompt or [""]
    prompts = [Prompt(text, settings, {"prompt": text}) for text in texts]
  if options.save_state and (len(prompts) > 1 or options.prompts or options.output):
    raise invalid("--save-state", options.save_state, "one --prompt, or --interactive")
  return settings, prompts


class _Printer:
  """Prints text as it comes, without control characters; see `printable`."""

  def __init__(self) -> None:
    self._held = ""

  def __call__(self, text: str) -> None:
    """Prints text, but keeps a carriage return until it is known whether a line end follows."""
    text = self._held + text
    self._held = "\r" if text.endswith("\r") else ""
    sys.stdout.write(printable(text[: len(text) - len(self._held)]))
    sys.stdout.flush()

  def end(self) -> None:
    """Prints what was kept, and a line end."""
    print(printable(self._held), flush=True)
    self._held = ""


def _print(
    options: argparse.Namespace, generator: Generator, model: LoadedModel,
    prompts: Sequence[Prompt], prefix: Prefix | None,
) -> Prefix | None:
  """Prints prompts with their continuations, in order, the current one as it comes.

  Returns:
    The prefix after the last one, if it is to be saved.
  """
  tokenizer = model.tokenizer
  requests = [
      each.settings.request(
          model, each.text, prefix, keep_state=options.save_state is not None
      )
      for each in prompts
  ]
  shown, last = 0, None
  # The texts of continuations that are not yet printed, and which ones have ended.
  later: list[list[str]] = [[] for _ in prompts]
  ended: set[int] = set()

  def begin() -> None:
    spelling = Spelling(tokenizer, prefix.last_ids if prefix else ())
    printer(spelling.push(requests[shown].ids) + spelling.end())

  printer = _Printer()
  begin()
  for piece in generator.stream(requests, block=SHOWN_TOKENS if len(prompts) == 1 else 64):
    later[piece.index].append(piece.text)
    if piece.result is not None:
      ended.add(piece.index)
      last = piece.result.prefix
    while shown < len(prompts) and later[shown]:
      printer("".join(later[shown]))
      later[shown] = []
      if shown in ended:
        printer.end()
        if len(prompts) > 1:
          print("-" * 72)
        shown += 1
        if shown < len(prompts):
          begin()
  return last


def _write(
    options: argparse.Namespace, generator: Generator, model: LoadedModel,
    prompts: Sequence[Prompt], prefix: Prefix | None,
) -> None:
  """Writes the continuations of prompts as lines of JSON, to --output or to the standard output."""
  def line(place: int, result: Result) -> dict[str, object]:
    return generating.continuation(prompts[place], result, log_probs=options.log_probs)

  if not options.output:
    results = dict(generating.continue_prompts(generator, model, prompts, prefix))
    for place in range(len(prompts)):
      print(generating.json_line(line(place, results[place]), ascii_only=True))
    return
  output = generating.OutputLines(
      check_file(options.output, "--output"), _job(options, generator, model, prompts)
  )
  for place, result in generating.continue_prompts(
      generator, model, prompts, prefix, done=output.lines
  ):
    output.add(place, line(place, result))
  output.finish()


def _job(
    options: argparse.Namespace, generator: Generator, model: LoadedModel,
    prompts: Sequence[Prompt],
) -> str:
  """Returns a digest of what the continuations depend on."""
  state = Path(options.from_state).expanduser().read_bytes() if options.from_state else b""
  config = generator.programs.model.config
  return generating.job_digest(
      repr([(each.text, each.settings, each.copied) for each in prompts]), state.hex(),
      repr(config), params_fingerprint(model.model), model.tokenizer.fingerprint,
      repr((model.template, generator.programs.batch_size, options.log_probs)),
  )


def _converse(
    generator: Generator, model: LoadedModel, settings: Settings, prefix: Prefix | None
) -> Prefix | None:
  """Continues what is typed, until the input ends; returns the prefix after it."""
  with contextlib.suppress(ImportError):
    import readline  # noqa: F401  # Lets `input` edit lines.

  conversation = generating.Conversation(generator, model, settings, prefix)
  with Break() as ctrl_c:
    for text in _typed(ctrl_c):
      ctrl_c.asked = False
      printer = _Printer()
      for piece in conversation.answer(text, lambda: ctrl_c.asked):
        printer(piece)
      printer.end()
  return conversation.prefix


def _typed(ctrl_c: Break) -> Iterator[str]:
  """Yields lines of the standard input; on a terminal, after a mark."""
  mark = "> " if sys.stdin.isatty() else ""
  while True:
    ctrl_c.raises = True
    try:
      line = input(mark)
    except EOFError:
      return
    except KeyboardInterrupt:
      print("\n(Ctrl-D ends)", flush=True)
      continue
    except UnicodeDecodeError as error:
      raise InputError("the standard input is not valid: expected text in UTF-8") from error
    finally:
      ctrl_c.raises = False
    generating.check_text(line, "the standard input")
    yield line


if __name__ == "__main__":
  common.run(main)

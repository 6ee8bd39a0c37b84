"""Continuing texts with a loaded model: prompts of a file, and a conversation that keeps its state.

`turn_ids` is the one place where what a person writes becomes token ids.
"""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import tqdm
from etils import epath

from dense_jax.config import LARGEST_SEED, invalid
from dense_jax.data.spelling import prompt_ids
from dense_jax.data.tokenizer import Tokenizer
from dense_jax.errors import InputError, did_you_mean
from dense_jax.files import is_remote, make_path, parse_json, write_atomically
from dense_jax.generation.generator import Generator
from dense_jax.generation.requests import Prefix, Request, Result
from dense_jax.generation.sampling import PLAIN, Sampling
from dense_jax.models.params import abstract_model, get_params, with_params
from dense_jax.runs.restoring import LoadedModel

# All new tokens of a continuation are held in memory until it ends.
MOST_NEW_TOKENS = 10**6
# Tokens between two pieces of a text that is shown as it comes.
SHOWN_TOKENS = 4
_SAMPLING_KEYS = tuple(field.name for field in dataclasses.fields(Sampling))
# The keys of a line in a file of prompts, and the types of their values.
_KEYS: Mapping[str, tuple[type, ...]] = {
    "id": (object,), "prompt": (str,), "max_new_tokens": (int,), "seed": (int,),
    "stop": (str, list), "temperature": (int, float), "top_k": (int,), "top_p": (int, float),
    "min_p": (int, float), "repetition_penalty": (int, float),
}


@dataclasses.dataclass(frozen=True)
class Settings:
  """The settings of a continuation.

  Attributes:
    sampling: the distribution to draw from.
    max_new_tokens: the most tokens to draw, at most `MOST_NEW_TOKENS`.
    seed: of the draws, from 0 to 2^32 - 1.
    stop: texts before the first of which the continuation ends. A document's end always ends it.

  Raises:
    InputError: a value is not valid.
  """

  sampling: Sampling = PLAIN
  max_new_tokens: int = 128
  seed: int = 0
  stop: tuple[str, ...] = ()

  def __post_init__(self) -> None:
    if not 0 <= self.max_new_tokens <= MOST_NEW_TOKENS:
      raise invalid(
          "max_new_tokens", self.max_new_tokens, f"an integer from 0 to {MOST_NEW_TOKENS}"
      )
    if not 0 <= self.seed <= LARGEST_SEED:
      raise invalid("seed", self.seed, f"an integer from 0 to {LARGEST_SEED}")
    if not all(self.stop):
      raise invalid("stop", "", "a text that is not empty")

  def request(
      self, tokenizer: Tokenizer, text: str, prefix: Prefix | None = None, *,
      keep_state: bool = False,
  ) -> Request:
    """Returns the request to continue `text`, which follows `prefix` if there is one."""
    return Request(
        turn_ids(tokenizer, text, begins=prefix is None), self.sampling, self.max_new_tokens,
        self.seed, (tokenizer.eos_id,), self.stop, prefix, keep_state,
    )


def turn_ids(tokenizer: Tokenizer, text: str, *, begins: bool) -> list[int]:
  """Returns the ids of what a person wrote.

  Args:
    tokenizer: the model's.
    text: what was written. A model that was tuned to a template of turns is given the text in that
      template here.
    begins: whether the text begins a document, before which bos goes if the tokenizer adds it.
  """
  return prompt_ids(tokenizer, text) if begins else tokenizer.encode(text)


def with_state_dtype(model: LoadedModel, dtype: str) -> LoadedModel:
  """Returns the model with `config.model.state_dtype` = `dtype`: the same parameters."""
  config = dataclasses.replace(model.model.config, state_dtype=dtype)
  changed = with_params(abstract_model(config), get_params(model.model))
  return dataclasses.replace(model, model=changed)


@dataclasses.dataclass(frozen=True)
class Prompt:
  """A line of a file of prompts.

  Attributes:
    text: the text to continue.
    settings: those of its continuation.
    copied: what the line of its continuation repeats: `prompt`, and `id` if there is one.
  """

  text: str
  settings: Settings
  copied: Mapping[str, Any]


def read_prompts(path: str, field: str, settings: Settings) -> list[Prompt]:
  """Reads a file of prompts: a JSON object in each line, with `prompt` and other keys of `_KEYS`.

  Args:
    path: the file. Lines of white space alone are left out.
    field: the option that named the file, for error messages.
    settings: what a line does not say.

  Raises:
    InputError: the file cannot be read or has no prompt, or a line is not valid; the error names
      the line.
  """
  try:
    lines = make_path(path, field).read_bytes().split(b"\n")
  except OSError as error:
    raise invalid(field, path, f"a file to read ({error.strerror or error})") from error
  prompts = []
  for number, line in enumerate(lines, 1):
    if line.strip():
      try:
        prompts.append(_prompt(line, settings))
      except (InputError, ValueError) as error:
        raise InputError(f"{field}: line {number} of {path}: {error}") from error
  if not prompts:
    raise invalid(field, path, 'a file of lines such as {"prompt": "Once"}; it has none')
  return prompts


def _prompt(line: bytes, settings: Settings) -> Prompt:
  """Parses a line.

  Raises:
    ValueError, InputError: the line is not valid.
  """
  values = parse_json(line)
  if not isinstance(values, dict) or "prompt" not in values:
    raise ValueError('expected an object with the key "prompt"')
  for key, value in values.items():
    if key not in _KEYS:
      hint = did_you_mean(key, list(_KEYS))
      raise InputError(f"unknown key {key!r}{hint} Valid keys: {', '.join(_KEYS)}")
    types = _KEYS[key]
    if not isinstance(value, types) or (isinstance(value, bool) and types != (object,)):
      raise invalid(key, value, " or ".join(each.__name__ for each in types))
  stop = values.get("stop", settings.stop)
  stop = (stop,) if isinstance(stop, str) else tuple(stop)
  if not all(isinstance(text, str) for text in stop):
    raise invalid("stop", list(stop), "a text or a list of texts")
  for text in (values["prompt"], *stop):
    check_text(text, "a text")
  sampling = dataclasses.replace(
      settings.sampling, **{key: values[key] for key in _SAMPLING_KEYS if key in values}
  )
  own = Settings(
      sampling, values.get("max_new_tokens", settings.max_new_tokens),
      values.get("seed", settings.seed), stop,
  )
  copied = {key: values[key] for key in ("id", "prompt") if key in values}
  return Prompt(values["prompt"], own, copied)


def check_text(text: str, field: str) -> None:
  """Checks that a text is UTF-8; Python represents other bytes as lone surrogates.

  Raises:
    InputError: it is not.
  """
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise invalid(field, text, "text in UTF-8") from error


def continuation(prompt: Prompt, result: Result, *, log_probs: bool) -> dict[str, Any]:
  """Returns the line of a result: what was copied, `text`, `reason` and `tokens`.

  With `log_probs`, also `ids` and `log_probs`, one for each new token.
  """
  line = dict(prompt.copied) | {
      "text": result.text, "reason": result.reason, "tokens": len(result.ids)
  }
  return line | ({"ids": result.ids, "log_probs": result.log_probs} if log_probs else {})


def continue_prompts(
    generator: Generator, tokenizer: Tokenizer, prompts: Sequence[Prompt],
    prefix: Prefix | None = None, *, done: Mapping[int, Any] | None = None,
) -> Iterator[tuple[int, Result]]:
  """Continues prompts; yields places and results as they are finished, with a progress bar.

  Args:
    generator: the model's.
    tokenizer: the model's.
    prompts: the prompts.
    prefix: a text that comes before each of them.
    done: places of prompts that are left out.
  """
  places = [place for place in range(len(prompts)) if place not in (done or {})]
  requests = [
      prompts[place].settings.request(tokenizer, prompts[place].text, prefix) for place in places
  ]
  if not requests:
    return
  with tqdm.tqdm(
      total=len(prompts), initial=len(prompts) - len(places), unit="prompt", desc="generating",
      leave=False, disable=None,  # On a terminal only.
  ) as bar:
    for piece in generator.stream(requests):
      if piece.result is not None:
        bar.update()
        yield places[piece.index], piece.result


class OutputLines:
  """A file of JSON lines that appears when all are there; what is finished before is kept.

  Lines are kept in a file beside it, whose name ends in .partial, in the order in which they were
  finished. A later call for the same job goes on from there.
  """

  def __init__(self, file: epath.Path, job: str) -> None:
    """Reads the lines that an earlier call for this job kept.

    Args:
      file: the file, from `outputs.check_file`.
      job: a digest of all that the lines depend on.
    """
    self._file = file
    self._partial = file.with_name(f"{file.name}.partial")
    self.lines: dict[int, Any] = {}
    file.parent.mkdir(parents=True, exist_ok=True)
    header = json.dumps({"job": job}).encode()
    first, _, rest = self._read_partial().partition(b"\n")
    if first == header:
      # The last line may be cut off, and others may be damaged: their prompts are continued again.
      for line in rest.split(b"\n")[:-1]:
        with contextlib.suppress(ValueError, TypeError):
          place, content = parse_json(line)
          self.lines[int(place)] = dict(content)
    if not is_remote(file):
      kept = [json.dumps([place, line]).encode() for place, line in self.lines.items()]
      write_atomically(self._partial, b"\n".join([header, *kept, b""]))

  def _read_partial(self) -> bytes:
    if is_remote(self._file) or not self._partial.is_file():
      return b""
    return self._partial.read_bytes()

  def add(self, place: int, line: Any) -> None:
    """Keeps the line of a place."""
    self.lines[place] = line
    if not is_remote(self._file):
      with self._partial.open("ab") as file:
        file.write(json.dumps([place, line]).encode() + b"\n")

  def finish(self) -> None:
    """Writes the file, in the order of places, and removes the lines beside it."""
    texts = [json_line(self.lines[place]) for place in sorted(self.lines)]
    write_atomically(self._file, "".join(f"{text}\n" for text in texts).encode())
    if not is_remote(self._file):
      self._partial.unlink(missing_ok=True)


def json_line(content: Any, *, ascii_only: bool = False) -> str:
  """Returns a line of JSON, which a terminal shows safely with `ascii_only`."""
  return json.dumps(content, ensure_ascii=ascii_only)


def job_digest(*parts: str) -> str:
  """Returns a digest of what a file of continuations depends on."""
  return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class Conversation:
  """A text that a person and a model write in turns; the model's state is kept between them.

  Attributes:
    prefix: the text so far; None before the first turn.
  """

  def __init__(
      self, generator: Generator, tokenizer: Tokenizer, settings: Settings,
      prefix: Prefix | None = None,
  ) -> None:
    self._generator, self._tokenizer, self._settings = generator, tokenizer, settings
    self.prefix = prefix

  def answer(self, text: str, stop: Callable[[], bool] = lambda: False) -> Iterator[str]:
    """Reads `text` and yields the pieces of what the model writes after it.

    Args:
      text: what the person wrote; may be empty.
      stop: is called every few tokens; if it returns true, the answer ends where it is.
    """
    request = self._settings.request(self._tokenizer, text, self.prefix, keep_state=True)
    for piece in self._generator.stream([request], block=SHOWN_TOKENS, stop=stop):
      if piece.result is not None:
        self.prefix = piece.result.prefix
      yield piece.text

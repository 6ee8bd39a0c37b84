"""lm-evaluation-harness (the package `lm_eval`) with a model of this project as its back end.

    answers = Answers("my model", tokenizer, likelihood, generate)
    lm_eval.simple_evaluate(model_class()(answers), tasks=[...], task_manager=...)

The harness makes the prompts and computes the metrics. This project tokenizes and scores, as for
its own tasks (`dense_jax.evaluation.likelihood`).
"""

import contextlib
import dataclasses
import functools
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import tqdm

from dense_jax.config import invalid
from dense_jax.data.tokenizer import Tokenizer
from dense_jax.errors import InputError
from dense_jax.evaluation.likelihood import Likelihood, Request, Scored, encode_pairs

# The name under which the harness knows the back end, and the most tokens that it generates for a
# task that does not say.
NAME = "dense_jax"
_MAX_NEW_TOKENS = 256
# What a task may say of sampling, beside the temperature.
_SAMPLING = ("top_k", "top_p", "min_p", "repetition_penalty")


@dataclasses.dataclass(frozen=True)
class Continuation:
  """A text that the harness wants continued.

  Attributes:
    prompt: the text.
    until: strings at the first of which the continuation ends.
    max_new_tokens: the most tokens.
    sampling: values of `dense_jax.generation.sampling.Sampling` by name.
  """

  prompt: str
  until: tuple[str, ...]
  max_new_tokens: int
  sampling: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Answers:
  """The model, tokenizer and generator that answer the harness's requests.

  Attributes:
    name: says which model it is, for the results.
    tokenizer: the model's tokenizer.
    likelihood: scores tokens.
    generate: returns the new text of each of these, without the string that ended it.
  """

  name: str
  tokenizer: Tokenizer
  likelihood: Likelihood
  generate: Callable[[Sequence[Continuation]], list[str]]


def require() -> Any:
  """Imports lm_eval so that neither it nor its libraries ask the network for anything.

  Raises:
    InputError: it is not installed.
  """
  os.environ.setdefault("HF_HUB_OFFLINE", "1")
  os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
  # Its bootstrap would fork, which a process that runs jax must not.
  os.environ.setdefault("DISABLE_MULTIPROC", "1")
  try:
    import lm_eval
  except ImportError as error:
    raise InputError(
        "--harness needs lm-evaluation-harness (lm_eval): pip install -e '.[eval]'"
    ) from error
  return lm_eval


@contextlib.contextmanager
def quiet() -> Iterator[None]:
  """Leaves standard output to the caller.

  The harness's progress goes to a terminal or nowhere, and its warnings, one for each task and
  metric whose definition leaves something to a default, are not shown.
  """
  log = logging.getLogger("lm_eval")
  level = log.level
  with open(os.devnull, "w") as nowhere, contextlib.ExitStack() as stack:
    shown = sys.stderr if sys.stderr.isatty() else nowhere
    stack.enter_context(contextlib.redirect_stdout(shown))
    if shown is nowhere:
      stack.enter_context(contextlib.redirect_stderr(nowhere))
    stack.callback(log.setLevel, level)
    log.setLevel(logging.ERROR)
    yield


@functools.cache
def model_class() -> Any:
  """Returns the harness's model class, registered there as `dense_jax`.

  It is a subclass of `lm_eval.api.model.TemplateLM`, made from an `Answers`. Its attribute `load`
  makes an `Answers` of the harness's model arguments; `dense_jax.runs.harness.register` sets it.

  Raises:
    InputError: lm_eval is not installed.
  """
  require()
  from lm_eval.api.model import TemplateLM
  from lm_eval.api.registry import register_model
  from lm_eval.utils import simple_parse_args_string

  @register_model(NAME)
  class DenseJax(TemplateLM):
    """Answers log-likelihood and generation requests by an `Answers`."""

    load: Callable[..., Answers]

    def __init__(self, answers: Answers) -> None:
      super().__init__()
      self.answers = answers

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> Any:
      """Makes the model of "workdir=runs/smoke,batch_size=8"; see `create_from_arg_obj`."""
      return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> Any:
      """Makes the model of the arguments of `load`; the harness's batch size is one of them."""
      given = additional_config or {}
      size = {key: given[key] for key in ("batch_size",) if given.get(key) is not None}
      return cls(cls.load(**size | arg_dict))

    @property
    def eot_token_id(self) -> int:
      """The id that ends a text."""
      return self.answers.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
      """The id that stands before a text without context."""
      return self.answers.tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
      """The tokenizer's fingerprint, by which the harness keeps prompts."""
      return self.answers.tokenizer.fingerprint

    def get_model_info(self) -> dict[str, Any]:
      """Returns what the results say of the model."""
      return {"model_name": self.answers.name}

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
      """Returns the ids of a text, after bos if the tokenizer adds it and the text has none."""
      del kwargs
      tokenizer = self.answers.tokenizer
      ids = tokenizer.encode(string)
      if not tokenizer.add_bos or add_special_tokens is False or ids[:1] == [tokenizer.bos_id]:
        return ids
      return [tokenizer.bos_id, *ids]

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
      """Returns (log-likelihood in nats, whether it is the greedy continuation) of each pair."""
      del disable_tqdm
      texts = [request.args for request in requests]
      return self._answer(texts, encode_pairs(self.answers.tokenizer, texts))

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
      del kwargs
      ids = [Request(tuple(context), tuple(target)) for _, context, target in requests]
      return self._answer([texts for texts, _, _ in requests], ids)

    def _answer(
        self, texts: Sequence[tuple[str, str]], requests: Sequence[Request]
    ) -> list[tuple[float, bool]]:
      answers = [(score.log_likelihood, score.greedy) for score in self._score(requests)]
      for pair, answer in zip(texts, answers, strict=True):
        self.cache_hook.add_partial("loglikelihood", pair, answer)
      return answers

    def _score(self, requests: Sequence[Request]) -> list[Scored]:
      with tqdm.tqdm(
          total=len(requests), unit="request", leave=False, disable=not sys.stderr.isatty()
      ) as bar:
        return self.answers.likelihood.score(requests, lambda done: bar.update(len(done)))

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
      """Returns the log-likelihood of each whole text, in nats, which bos precedes."""
      del disable_tqdm
      texts = [text for (text,) in (request.args for request in requests)]
      windows = self.answers.likelihood.windows
      pages = [windows(ids) for ids in self.answers.tokenizer.encode_batch(texts)]
      scored = iter(self._score([window for page in pages for window in page]))
      answers = [sum(next(scored).log_likelihood for _ in page) for page in pages]
      for text, answer in zip(texts, answers, strict=True):
        self.cache_hook.add_partial("loglikelihood_rolling", (text,), answer)
      return answers

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
      """Returns the continuation of each context up to the first of its stop strings."""
      del disable_tqdm
      asked = [request.args for request in requests]
      texts = self.answers.generate([_continuation(*arguments) for arguments in asked])
      for arguments, text in zip(asked, texts, strict=True):
        self.cache_hook.add_partial("generate_until", arguments, text)
      return texts

  return DenseJax


def _continuation(context: str, options: Mapping[str, Any]) -> Continuation:
  """Reads a task's generation_kwargs.

  Raises:
    InputError: an option is none that generation here has.
  """
  from lm_eval.models.utils import normalize_gen_kwargs

  values = dict(normalize_gen_kwargs(dict(options), _MAX_NEW_TOKENS))
  until, most = tuple(filter(None, values.pop("until"))), values.pop("max_gen_toks")
  temperature = values.pop("temperature", 1.0)
  sampling = {"temperature": float(temperature) if values.pop("do_sample") else 0.0}
  sampling |= {key: values.pop(key) for key in _SAMPLING if key in values}
  if values:
    raise invalid("generation_kwargs", values, f"until, max_gen_toks, do_sample, temperature, "
                  f"{', '.join(_SAMPLING)}")
  return Continuation(context, until, most, sampling)

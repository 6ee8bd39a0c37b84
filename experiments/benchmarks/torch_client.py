"""Runs `torch_rival.py` in a process of its own and times its steps from here.

The process and this one take turns: each waits while the other computes.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import subprocess
import tempfile
from collections.abc import Sequence
from typing import Any, Self

import numpy as np

from dense_jax.config import invalid
from dense_jax.errors import InputError
from dense_jax.files import make_path
from dense_jax.interop import save_hf
from dense_jax.models.language_model import LanguageModel
from dense_jax.types import Array
from experiments.benchmarks import common

SCRIPT = pathlib.Path(__file__).with_name("torch_rival.py")
MODELLING_FILE = "modeling_dense_gau_retnet.py"
# Nats: the same weights and tokens must give the same loss before anything is timed.
AGREEMENT = 1e-3
# How long a process may take to end when it is asked nothing more.
_END_SECONDS = 10.0


@dataclasses.dataclass(frozen=True)
class Rivals:
  """The code to compare with, and the Python that runs it.

  Attributes:
    authors: the folder with the authors' modelling file; "" means that it is not compared with.
    python: the Python that has torch and transformers.
    script: the program that it runs.
  """

  authors: str
  python: str
  script: pathlib.Path = SCRIPT

  def modelling_file(self) -> str:
    """Returns the authors' file, or "" without a folder.

    Raises:
      InputError: the folder does not have it.
    """
    if not self.authors:
      return ""
    file = make_path(self.authors, "--authors") / MODELLING_FILE
    if not file.is_file():
      raise invalid(
          "--authors", self.authors, f"a folder with {MODELLING_FILE}, from the release of DenseSSM"
      )
    return str(file)


class TorchRival:
  """A model in PyTorch with the weights of one of ours; a context manager, which ends its process.

  Attributes:
    parameters: the number of its parameters.
    facts: the number of threads and the versions of its libraries.
  """

  def __init__(self, rivals: Rivals, model: LanguageModel, *, code: str) -> None:
    """Starts the process and gives it the model.

    Args:
      rivals: how it is run.
      model: the model whose weights it takes.
      code: the authors' modelling file; "" means transformers' own class.

    Raises:
      InputError: that Python cannot be started, or lacks torch or transformers. All methods raise
        one if the process fails, ends, or answers something else than it should.
    """
    self._script = rivals.script
    with tempfile.TemporaryDirectory() as folder:
      saved = os.path.join(folder, "model")
      save_hf(model, saved)
      self._process = _start(rivals)
      self.facts = self._ask("load", "parameters", folder=saved, code=code)
    self.parameters = self.facts.pop("parameters")

  def _ask(self, what: str, number: str, **arguments: Any) -> dict[str, Any]:
    """Returns the answer to a request, which has a number of this name."""
    assert self._process.stdin is not None
    assert self._process.stdout is not None
    line, answer = "", None
    with contextlib.suppress(BrokenPipeError):  # It has ended; the missing answer tells it too.
      print(json.dumps({"do": what, **arguments}), file=self._process.stdin, flush=True)
      line = self._process.stdout.readline()
    with contextlib.suppress(ValueError):
      answer = json.loads(line)
    if isinstance(answer, dict) and isinstance(answer.get(number), int | float):
      return answer
    if not line:
      why = "the process ended, see above"
    elif isinstance(answer, dict) and "error" in answer:
      why = answer["error"]
    else:
      why = f"expected a JSON object with the number {number!r}, and it answered {line[:80]!r}"
    self.close()
    raise InputError(
        f"{self._script.name} cannot {what}: {why} (it needs --rival-python PYTHON, "
        "one with: pip install torch transformers safetensors)"
    )

  def trains_on(self, rows: Sequence[Sequence[int]] | Array, loss: float) -> None:
    """Gives it the rows to train on.

    Args:
      rows: token ids.
      loss: our mean loss of each row's tokens after the first, in nats.

    Raises:
      AssertionError: its loss is another one.
    """
    theirs = self._ask("batch", "loss", tokens=np.asarray(rows).tolist())["loss"]
    if not abs(theirs - loss) < AGREEMENT:
      raise AssertionError(f"the rival's loss is {theirs:.6f} nats, and ours {loss:.6f}")

  def train(self) -> float:
    """Runs one train step; returns its seconds."""
    return float(self._ask("train", "seconds")["seconds"])

  def decode(self, prompts: Sequence[Sequence[int]], count: int) -> float:
    """Continues prompts by `count` tokens; returns the seconds per token, of all rows together."""
    rows = [list(row) for row in prompts]
    return float(self._ask("decode", "seconds", tokens=rows, count=count)["seconds"])

  def close(self) -> None:
    """Ends the process; one that does not end by itself is killed."""
    assert self._process.stdin is not None
    assert self._process.stdout is not None
    with contextlib.suppress(BrokenPipeError):
      self._process.stdin.close()
    try:
      self._process.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
      self._process.kill()
      self._process.wait()
    self._process.stdout.close()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()


def _start(rivals: Rivals) -> subprocess.Popen[str]:
  # Threads that spin while they wait would take time from this process's.
  environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}
  environment.pop("PYTHONPATH", None)  # Packages of this Python are not for that one.
  try:
    return subprocess.Popen(
        [rivals.python, str(rivals.script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True, errors="replace", env=environment,
    )
  except OSError as error:
    raise InputError(
        f"--rival-python {rivals.python} cannot be started: {error.strerror}"
    ) from error


def shown(times: common.Compared, units: float) -> list[str]:
  """Returns a table's cells: both rates in units per second, their ratio and its quartiles."""
  return [
      f"{units / times.first:.0f}", f"{units / times.second:.0f}", common.ratio(times.ratio),
      times.middle(),
  ]

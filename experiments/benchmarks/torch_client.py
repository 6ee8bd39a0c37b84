"""Runs `torch_rival.py` in a process of its own and times its steps from here."""

import dataclasses
import os
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Self

import numpy as np

from dense_jax.config import invalid
from dense_jax.files import make_path
from dense_jax.interop import save_hf
from dense_jax.models.language_model import LanguageModel
from dense_jax.types import Array
from experiments.benchmarks import common
from experiments.benchmarks.worker import Worker

SCRIPT = pathlib.Path(__file__).with_name("torch_rival.py")
MODELLING_FILE = "modeling_dense_gau_retnet.py"
# Nats: the same weights and tokens must give the same loss before anything is timed.
AGREEMENT = 1e-3


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
    environment = dict(os.environ)
    environment.pop("PYTHONPATH", None)  # Packages of this Python are not for that one.
    with tempfile.TemporaryDirectory() as folder:
      saved = os.path.join(folder, "model")
      save_hf(model, saved)
      self._worker = Worker(
          rivals.python, rivals.script, environment, option="--rival-python",
          needs="--rival-python PYTHON, one with: pip install torch transformers safetensors",
      )
      self.facts = self._worker.ask("load", "parameters", folder=saved, code=code)
    self.parameters = self.facts.pop("parameters")

  def trains_on(self, rows: Sequence[Sequence[int]] | Array, loss: float) -> None:
    """Gives it the rows to train on.

    Args:
      rows: token ids.
      loss: our mean loss of each row's tokens after the first, in nats.

    Raises:
      AssertionError: its loss is another one.
    """
    theirs = self._worker.ask("batch", "loss", tokens=np.asarray(rows).tolist())["loss"]
    if not abs(theirs - loss) < AGREEMENT:
      raise AssertionError(f"the rival's loss is {theirs:.6f} nats, and ours {loss:.6f}")

  def train(self) -> float:
    """Runs one train step; returns its seconds."""
    return float(self._worker.ask("train", "seconds")["seconds"])

  def decode(self, prompts: Sequence[Sequence[int]], count: int) -> float:
    """Continues prompts by `count` tokens; returns the seconds per token, of all rows together."""
    rows = [list(row) for row in prompts]
    return float(self._worker.ask("decode", "seconds", tokens=rows, count=count)["seconds"])

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    self._worker.close()


def shown(times: common.Compared, units: float) -> list[str]:
  """Returns a table's cells: both rates in units per second, their ratio and its quartiles."""
  return [
      f"{units / times.first:.0f}", f"{units / times.second:.0f}", common.ratio(times.ratio),
      times.middle(),
  ]

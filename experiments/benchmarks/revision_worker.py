"""Steps of the dense_jax under PYTHONPATH, which `revisions.py` times beside another one's.

    {"do": "train", "family": F, "size": [D, L, V, B, T], "options": {...}}
                                      makes a train step, and runs it twice -> {"tokens"}
    {"do": "decode", "family": F, "size": [...], "options": {...}}
                                      makes greedy decoding of B prompts -> {"tokens"}, B
    {"do": "mixer", "family": F, "size": [...], "options": {...}}
                                      makes one mixer's forward and backward pass -> {"tokens"}
    {"do": "step"}                    runs what was made last -> {"seconds"}

The tree may be older than this file: what is imported from it must be what it has had for long.
"""

import importlib
from collections.abc import Callable
from typing import Any

import jax

from dense_jax.models.registry import FAMILIES
from experiments.benchmarks import common, cpu_modes


class Steps:
  """The step that was made last."""

  def __init__(self) -> None:
    self._step: Callable[[], float] = lambda: 0.0

  def _settings(self, family: str, size: list[int], options: dict[str, Any]) -> Any:
    return common.config(family, common.Size(*size), **options)

  def train(self, family: str, size: list[int], options: dict[str, Any]) -> dict[str, int]:
    """Makes a train step: forward, backward and AdamW."""
    self._step = common.TrainStep(self._settings(family, size, options))
    self._step()
    return {"tokens": size[3] * size[4]}

  def decode(self, family: str, size: list[int], options: dict[str, Any]) -> dict[str, int]:
    """Makes decoding, whose step is a token of each row."""
    self._step = common.Decoding(self._settings(family, size, options), size[3])
    return {"tokens": size[3]}

  def mixer(self, family: str, size: list[int], options: dict[str, Any]) -> dict[str, int]:
    """Makes one mixer in its default form, forward and backward, on B random rows."""
    config = self._settings(family, size, options).model
    x_BTD = jax.random.normal(jax.random.key(0), (size[3], size[4], size[0]))
    _, gradient = cpu_modes.passes(FAMILIES[family].mixer, config, x_BTD)
    self._step = common.timed(gradient)
    self._step()
    return {"tokens": size[3] * size[4]}

  def step(self) -> dict[str, float]:
    """Runs the step twice, and times the second: the first finds the other process's caches."""
    self._step()
    return {"seconds": self._step()}


if __name__ == "__main__":
  # The file beside this one: an older tree under PYTHONPATH does not have it.
  importlib.import_module("torch_rival").serve(Steps)

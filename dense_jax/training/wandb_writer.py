"""Writes a run's records to Weights & Biases, for those who have it installed."""

import importlib.util
import os
import uuid
from collections.abc import Mapping

from etils import epath

from dense_jax.config import ExperimentConfig, defaults, invalid
from dense_jax.files import is_remote, write_atomically

# The run's id there, so that a run that resumes is one run there too.
ID_FILE = "wandb_id"


def check_wandb(project: str) -> None:
  """Checks that records can be sent to a project; "" means none.

  Raises:
    InputError: wandb is not installed.
  """
  if project and importlib.util.find_spec("wandb") is None:
    raise invalid(
        "config.watch.wandb", project,
        "empty, or an environment with wandb (pip install -e '.[wandb]')",
    )


class WandbWriter:
  """Sends records to a project of Weights & Biases.

  WANDB_MODE=offline keeps them in the run's folder instead, until `wandb sync` sends them.
  """

  def __init__(self, workdir: epath.Path, project: str, config: ExperimentConfig) -> None:
    """Begins the run there, or goes on with it.

    Args:
      workdir: the run's folder, which gives the run its name there.
      project: the project's name.
      config: the run's configuration, which is shown there.
    """
    import wandb

    file = workdir / ID_FILE
    if not file.is_file():
      write_atomically(file, uuid.uuid4().hex.encode())
    self._run = wandb.init(
        project=project, name=workdir.name, id=file.read_text().strip(), resume="allow",
        config=defaults(config), dir=None if is_remote(workdir) else os.fspath(workdir),
        settings=wandb.Settings(silent=True, console="off"),
    )
    # Its own counter never goes back, as a run does that resumes from a checkpoint.
    self._run.define_metric("*", step_metric="step")

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Sends one record."""
    self._run.log({"step": step, **values})

  def flush(self) -> None:
    """Does nothing: records are sent by a process of wandb's."""

  def close(self) -> None:
    """Sends what is left."""
    self._run.finish()

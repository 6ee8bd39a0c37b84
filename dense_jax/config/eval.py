"""Tasks that are scored while a run trains: `config.eval`."""

import dataclasses

from dense_jax.config.checked import Config
from dense_jax.config.fields import integer, text


@dataclasses.dataclass(frozen=True)
class EvalConfig(Config, key="config.eval"):
  """Tasks from local files, scored during training without examples in their prompts.

  A context is read from its beginning, with the state carried. docs/evaluation.md defines the
  numbers, and names the files.
  """

  tasks: str = text(
      "", "empty, or names of tasks with commas between, such as lambada,hellaswag",
      help="tasks to score; empty means none")
  data: str = text(
      "", "empty, or a folder", help="the folder that has the tasks' files; nothing is downloaded")
  items: int = integer(
      200, 0, help="the first items of each task that are scored; 0 means all")
  every: int = integer(
      0, 0, help="steps between scores; 0 means train.eval_every. The last step is scored")

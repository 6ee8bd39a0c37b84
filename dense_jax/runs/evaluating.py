"""Runs the evaluators of a training run, and records their numbers."""

from collections.abc import Collection, Sequence

from dense_jax.config import ExperimentConfig, invalid
from dense_jax.data.pipeline import Datasets
from dense_jax.distributed import Agreement
from dense_jax.errors import InputError
from dense_jax.evaluation.evaluators import Evaluator, HeldOutLoss, Snapshot
from dense_jax.evaluation.exact_match import ExactMatch
from dense_jax.evaluation.task_evaluator import TaskScores
from dense_jax.training.loop import Hook, Logger, Moment
from dense_jax.training.metrics import MetricsWriter, Progress
from dense_jax.training.step import Trainer

# The evaluators of every run, each made without arguments.
STANDARD: tuple[type[Evaluator], ...] = (HeldOutLoss,)


def with_standard(
    evaluators: Sequence[Evaluator], config: ExperimentConfig
) -> list[Evaluator]:
  """Returns the standard evaluators, those of synthetic and other tasks, and the given ones.

  A given evaluator replaces another one that has its name.

  Raises:
    InputError: two of the given evaluators have the same name, an interval is not valid, or a
      task's files are missing or malformed.
  """
  given = {evaluator.name for evaluator in evaluators}
  chosen = [*(cls() for cls in STANDARD if cls.name not in given), *evaluators]
  if config.data.task.exists and ExactMatch.name not in given:
    chosen.append(ExactMatch())
  if config.eval.tasks and TaskScores.name not in given:
    chosen.append(TaskScores(config.eval))
  names = [evaluator.name for evaluator in chosen]
  for evaluator in chosen:
    if names.count(evaluator.name) > 1:
      raise InputError(f"evaluators: expected one of each name, but two are {evaluator.name!r}")
    if type(evaluator.every) is not int or evaluator.every < 0:
      raise invalid(
          f"evaluators: {evaluator.name}.every", evaluator.every,
          "an integer >= 0, where 0 takes config.train.eval_every",
      )
  return chosen


class Evaluations:
  """A run's evaluators.

  Each scores at most once per step, and the time that it takes does not count as training time.
  """

  def __init__(
      self, evaluators: Sequence[Evaluator], config: ExperimentConfig, data: Datasets,
      trainer: Trainer, writer: MetricsWriter, progress: Progress, logger: Logger,
  ) -> None:
    """Stores the evaluators, which come from `with_standard`; scores nothing yet."""
    self._evaluators, self._config, self._data = evaluators, config, data
    self._trainer, self._writer = trainer, writer
    self._progress, self._logger = progress, logger
    self._scored: dict[str, int] = {}
    self._heldout_loss: float | None = None

  def hooks(self) -> list[Hook]:
    """Returns one hook per evaluator; none is called when a run is interrupted."""

    def hook(evaluator: Evaluator) -> Hook:
      return Hook(
          self._every(evaluator), lambda moment: self._score(evaluator, moment),
          if_interrupted=False,
      )

    return [hook(evaluator) for evaluator in self._evaluators]

  def catch_up(self, moment: Moment, recorded: Collection[str]) -> None:
    """Scores what an interruption, which has no time for it, left out at the step it ended with.

    Args:
      moment: the step from which the run goes on.
      recorded: the names of the numbers that its records have of that step.
    """
    for evaluator in self._evaluators:
      prefix = f"{evaluator.name}_"
      is_missing = moment.step % self._every(evaluator) == 0 and not any(
          name.startswith(prefix) for name in recorded
      )
      if Agreement()(is_missing):  # All processes score, also if one does not see the records.
        self._score(evaluator, moment)

  def heldout_loss(self, moment: Moment) -> float | None:
    """Returns the held-out loss at a moment, in nats per token; computes it at most once."""
    for evaluator in self._evaluators:
      if evaluator.name == HeldOutLoss.name:
        self._score(evaluator, moment)
    return self._heldout_loss

  def _every(self, evaluator: Evaluator) -> int:
    return evaluator.every or self._config.train.eval_every

  def _score(self, evaluator: Evaluator, moment: Moment) -> None:
    """Scores, records the numbers and prints a line, unless this step was scored already."""
    if self._scored.get(evaluator.name) == moment.step:
      return
    self._scored[evaluator.name] = moment.step
    self._logger.pause()
    trainer = self._trainer
    snapshot = Snapshot(
        moment.step, self._config, trainer.model, moment.state.weights, self._data, trainer.rows,
        trainer.put,
    )
    numbers = {key: float(value) for key, value in evaluator.evaluate(snapshot).items()}
    if evaluator.name == HeldOutLoss.name:
      self._heldout_loss = numbers["loss"]
    self._writer.write(
        moment.step, {f"{evaluator.name}_{key}": value for key, value in numbers.items()}
    )
    averaged = "" if moment.state.ema is None else " (averaged parameters)"
    self._progress.line(f"step {moment.step}{averaged}  {evaluator.describe(numbers, snapshot)}")
    self._logger.resume()

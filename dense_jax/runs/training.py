"""Trains a run from its beginning, or resumes it from its newest checkpoint."""

import contextlib
import dataclasses
import functools
import logging
import os
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import tqdm
from etils import epath
from jax.sharding import Mesh

from dense_jax import distributed, sharding
from dense_jax.config import ExperimentConfig, invalid
from dense_jax.data.batches import TrainBatches
from dense_jax.data.passing import PassingOver
from dense_jax.data.pipeline import Datasets, load_datasets, rows_to_train, without_target
from dense_jax.data.row_store import RowStore
from dense_jax.data.tokenizer import Tokenizer
from dense_jax.evaluation.evaluators import Evaluator
from dense_jax.files import make_path
from dense_jax.formatting import parameter_table
from dense_jax.interrupt import Interrupt
from dense_jax.models.params import get_params
from dense_jax.models.registry import family
from dense_jax.models.warm_start import check_warm_start
from dense_jax.ops import resolver
from dense_jax.runs import resume
from dense_jax.runs import workdir as folders
from dense_jax.runs.evaluating import Evaluations, with_standard
from dense_jax.runs.guarding import Guarding, with_fresh_count
from dense_jax.runs.initial import Beginning, InitFrom, beginning
from dense_jax.runs.kernels import check_kernels
from dense_jax.runs.life import Life
from dense_jax.runs.memory import check_memory
from dense_jax.runs.profiling import Profile
from dense_jax.runs.recording import CHECKPOINT_SECONDS, Recorder
from dense_jax.training.checkpoint import Checkpoints, check_name, clear_uncommitted
from dense_jax.training.events import note_event
from dense_jax.training.lock import RunLock
from dense_jax.training.loop import DataWait, Hook, Logger, Moment, checkpoint_hook, train
from dense_jax.training.metrics import Progress
from dense_jax.training.step import Metrics, Trainer, TrainState
from dense_jax.training.wandb_writer import check_wandb

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class RunResult:
  """The state of a run when training returns.

  Attributes:
    workdir: the run's folder.
    config: the run's configuration, with the tokenizer's vocabulary.
    step: updates done, all of them saved.
    interrupted: who asked the run to end before its last step, such as "SIGTERM"; "" if all steps
      are done.
    metrics: name -> newest number in metrics.jsonl, such as "loss" (of the last training step that
      was logged) and "heldout_loss".
  """

  workdir: epath.Path
  config: ExperimentConfig
  step: int
  interrupted: str
  metrics: Mapping[str, float]

  @property
  def heldout_loss(self) -> float | None:
    """The newest held-out loss, in mean nats per token; None means that there is none yet."""
    return self.metrics.get("heldout_loss")


def train_run(
    config: ExperimentConfig, workdir: str | os.PathLike[str], *, hooks: Sequence[Hook] = (),
    evaluators: Sequence[Evaluator] = (), allow_change: Collection[str] = (),
    init_from: InitFrom | None = None, strict: bool = False, interrupt: Interrupt | None = None,
) -> RunResult:
  """Trains a model in a folder, or resumes the run that the folder holds.

  Prints progress. Writes checkpoints, metrics.jsonl, TensorBoard events, the configuration and the
  tokenizer into the folder. If there are several processes (see `distributed.initialize`), all of
  them call it with the same arguments, and only the first one writes. When it returns or raises, it
  leaves no thread, lock or open file behind.

  Args:
    config: the run's configuration.
    workdir: the folder, local or in a bucket; it is made if it does not exist.
    hooks: called after the evaluators and before a checkpoint is saved.
    evaluators: scores besides the standard ones (`dense_jax.runs.evaluating.STANDARD`: the held-out
      loss, by which checkpoints are ranked). An evaluator with the name of a standard one replaces
      it, for example a `HeldOutLoss` with another interval.
    allow_change: keys such as "train.steps" that may differ from the configuration that the run in
      the folder was made with, although they alter its course; see `dense_jax.runs.resume`.
    init_from: the model whose parameters and tokenizer the run begins with, at step 0 and with a
      fresh optimizer. It may have fewer dense connections, and the run then begins with its
      function (`dense_jax.models.warm_start`). It is not read again when the run goes on.
    strict: raises an error if the kernels that would run here compute something else than they
      should, instead of training by another form; see `check_kernels`.
    interrupt: an active context that may end the process, as a command line has. None means that
      signals are handled here: the first one makes it save and return, and no signal ends the
      process.

  Raises:
    InputError: the configuration, the data or the folder are not valid, or do not fit each other
      (the error names field, value and what is valid); the state is no longer finite; or the
      folder has vanished.
    DivergedError: steps were skipped one after the other, and going back did not help
      (`dense_jax.runs.guarding`).
    Stopped: (a KeyboardInterrupt) a request to end came before the first step was done, or a
      second request came.
  """
  folder = make_path(os.fspath(workdir), "--workdir")
  check_name(folder, "--workdir")
  resume.check_allowed(config, allow_change)
  check_wandb(config.watch.wandb)
  profile = Profile(folder, config.watch)
  evaluators = with_standard(evaluators, config)
  with contextlib.ExitStack() as stack:
    stack.enter_context(distributed.only_first_prints())
    if interrupt is None:
      interrupt = stack.enter_context(Interrupt(ends_process=False))
    interrupt.obey(lambda: folders.describe_saved(folder))
    lock = _take_lock(stack, folder)
    distributed.by_first(lambda: folders.check_config(folder, config, allow_change))
    mesh = sharding.make_mesh(config.mesh)
    begun = beginning(folder, init_from)
    config = _with_vocab_of(config, begun)
    data = _load_data(config, begun.tokenizer if begun else None)
    config = _with_vocab(config, data)
    check_kernels(config.model, strict=strict)
    check_memory(config)
    trainer = Trainer(config, mesh)
    _say_what_runs(config, mesh, trainer)
    # All processes have looked at the folder before the first one writes.
    distributed.check_same({"the configuration": config, "config.data": data.fingerprint})
    distributed.by_first(lambda: folders.check_data(folder, data))
    rows = rows_to_train(config.data, data.train)
    _say_what_rows(config, rows)
    batches = stack.enter_context(contextlib.closing(PassingOver(TrainBatches(
        rows, config.data.seq_len, config.train.batch_size, config.seed, rows=trainer.rows,
        mixtures=config.data.mixtures(), workers=config.data.workers,
    ))))
    guarding = Guarding(folder, config, batches, _say)
    tell = functools.partial(_tell, folder)
    distributed.by_first(lambda: clear_uncommitted(folder / folders.CHECKPOINTS, tell))
    checkpoints = stack.enter_context(contextlib.closing(Checkpoints(
        folder / folders.CHECKPOINTS, config.model, keep_last=config.train.keep_last,
        keep_best=config.train.keep_best, keep_every=config.train.keep_every, tell=tell,
    )))
    distributed.check_same({"--workdir (its newest checkpoint)": checkpoints.latest})
    state, init = _start(trainer, checkpoints, batches, config, mesh, begun)
    step = int(state.step)
    if step < config.train.steps:  # Else the run stays what it was trained with.
      distributed.by_first(lambda: folders.begin(folder, config, data, init))
    print(_span(step, config.train.steps, folder), flush=True)
    stack.enter_context(contextlib.closing(profile))
    life = Life(folder, step, config.train.steps, config.watch.hang_seconds)
    if step < config.train.steps:
      stack.enter_context(life)
    while True:
      with contextlib.ExitStack() as attempt:
        guarding.begin(state)
        recorder = attempt.enter_context(contextlib.closing(Recorder(folder, step, config)))
        progress = attempt.enter_context(contextlib.closing(Progress(step, config.train.steps)))
        data_wait = DataWait()
        logger = Logger(
            recorder, progress, every=config.train.log_every, first_step=step,
            steps=config.train.steps, data_wait=data_wait,
            tokens_per_step=config.train.batch_size * config.data.seq_len,
        )
        evaluations = Evaluations(evaluators, config, data, trainer, recorder, progress, logger)
        if not step and init:
          evaluations.heldout_loss(Moment(step, state, False))  # To compare later ones with.
        if 0 < step < config.train.steps:
          evaluations.catch_up(Moment(step, state, False), recorder.recorded)
        saving = _saving_hook(
            config, checkpoints, batches, recorder, evaluations, lock, guarding, logger
        )
        state = train(
            trainer, state, batches, steps=config.train.steps,
            hooks=[
                *(life.during("evaluating", hook) for hook in evaluations.hooks()), *hooks,
                *profile.hooks(), life.during("saving", saving),
            ],
            on_metrics=_watching(lock, logger, guarding, life), interrupt=interrupt,
            data_wait=data_wait, meanwhile=lambda: _saved_at_once(folder),
            wants_save=lambda: checkpoints.wants_save(config.train.checkpoint_minutes),
        )
        step = int(state.step)
        # Saving raises an error once too many saves have failed.
        while not checkpoints.is_saved() and not guarding.must_return(state):
          checkpoints.wait_to_retry(lambda: bool(interrupt.requested))
          saving.run(Moment(step, state, step < config.train.steps))
      if not guarding.must_return(state):
        break
      guarding.go_back(state, trainer, checkpoints.latest or 0)
      del state  # Before there is a second one.
      state, init = _start(trainer, checkpoints, batches, config, mesh, begun)
      state = with_fresh_count(state)
      step = int(state.step)
    step, interrupted = int(state.step), ""
    if step < config.train.steps:
      interrupted = interrupt.requested or "a signal to another process"
      life.interrupted(interrupted)
  return RunResult(folder, config, step, interrupted, recorder.newest)


def _tell(workdir: epath.Path, step: int, kind: str, text: str) -> None:
  """Warns of what happened to a checkpoint, and records it."""
  _LOG.warning("%s", text)
  note_event(workdir, step, kind, text)


def _say(text: str) -> None:
  """Prints a line above the progress bar."""
  tqdm.tqdm.write(text)
  sys.stdout.flush()


def _span(step: int, steps: int, folder: epath.Path) -> str:
  """Says which steps are to be done."""
  if step == steps:
    return f"all {steps} steps are done in {folder}"
  return f"from step {step} to {steps} in {folder}"


def _load_data(config: ExperimentConfig, tokenizer: Tokenizer | None) -> Datasets:
  with tqdm.tqdm(unit="B", unit_scale=True, desc="tokenizing", leave=False,
                 disable=not sys.stderr.isatty()) as bar:
    return load_datasets(config.data, lambda done: bar.update(max(done - bar.n, 0)), tokenizer)


def _with_vocab_of(config: ExperimentConfig, begun: Beginning | None) -> ExperimentConfig:
  """Returns the configuration for a run that began, or is to begin, with another model.

  Raises:
    InputError: the model cannot begin as the other one; see `check_warm_start`.
  """
  if begun is None:
    return config
  vocab_size = config.model.vocab_size or begun.vocab_size
  model = dataclasses.replace(config.model, vocab_size=vocab_size)
  if begun.source is not None:
    check_warm_start(begun.source.model, model)
  return dataclasses.replace(config, model=model)


def _with_vocab(config: ExperimentConfig, data: Datasets) -> ExperimentConfig:
  """Returns the configuration with the tokenizer's vocabulary size, if it has none."""
  needed = data.tokenizer.vocab_size
  if config.model.vocab_size and config.model.vocab_size < needed:
    raise invalid(
        "config.model.vocab_size", config.model.vocab_size,
        f"0, or an integer >= the tokenizer's {needed}",
    )
  model = dataclasses.replace(config.model, vocab_size=config.model.vocab_size or needed)
  return dataclasses.replace(config, model=model)


def _say_what_runs(config: ExperimentConfig, mesh: Mesh, trainer: Trainer) -> None:
  devices = jax.devices()
  form = family(config.model.family).form
  implementation = resolver.resolve(form, config.model.implementation)
  dense = config.model.dense
  where = f"devices: {len(devices)} x {devices[0].device_kind}"
  if jax.process_count() > 1:
    where = (f"{jax.process_count()} processes x {jax.local_device_count()} devices: "
             f"{devices[0].device_kind}")
  print(
      f"{where} | mesh: {sharding.describe_mesh(mesh.shape)}"
      f" | {config.model.family}, dense depth {dense.depth}"
      + (f" ({dense.inject})" if dense.depth else "")
      + f" | {form} states by: {implementation} | {config.model.dtype}"
  )
  print(parameter_table(get_params(trainer.model)), flush=True)


def _say_what_rows(config: ExperimentConfig, rows: RowStore) -> None:
  idle = without_target(rows, config.data.seq_len)
  if idle is None:
    return
  what = "padding" if config.data.packing == "best_fit" else "of them without a target"
  mixture = f" | mixture: {config.data.mixture}" if config.data.mixture else ""
  print(f"rows: {rows.num_windows(config.data.seq_len):,} of {config.data.seq_len:,} tokens, "
        f"{idle:.2%} {what}{mixture}", flush=True)


def _take_lock(stack: contextlib.ExitStack, folder: epath.Path) -> RunLock | None:
  """Takes the folder's lock in the first process, on behalf of all; returns None in the others."""
  locks: list[RunLock] = []

  def explain(_: object, error: BaseException | None, __: object) -> None:
    """Names the folder that is gone, whichever file in it was missed first."""
    if isinstance(error, OSError):
      locks[0].check()

  def take() -> None:
    locks.append(RunLock(folder, lambda said: print(said, flush=True)))
    stack.callback(locks[0].release)
    stack.push(explain)

  distributed.by_first(take)
  return locks[0] if locks else None


def _start(
    trainer: Trainer, checkpoints: Checkpoints, batches: PassingOver, config: ExperimentConfig,
    mesh: Mesh, begun: Beginning | None,
) -> tuple[TrainState, dict[str, Any] | None]:
  """Returns the state to go on from, and what init.json says.

  The state is that of the newest checkpoint or, if there is none, one with the parameters of the
  model to begin with, or with fresh ones.
  """
  if checkpoints.latest is not None:
    state, position = checkpoints.restore_newest(trainer.state_shapes)
    batches.set_state(position)
    return state, begun.record if begun else None
  batches.go_to(0)  # A run that goes back has moved them.
  if begun is None or begun.source is None:
    return trainer.init(config.seed), None
  name, params = begun.source.load(mesh)
  record = begun.source.record(name, config.model)
  print(f"begins with {name}: {record['copied']:,} of its numbers"
        + (f", and {record['new']:,} new ones that change nothing yet" if record["new"] else ""),
        flush=True)
  distributed.check_same({"--init-from": record})
  return trainer.init_from(config.seed, begun.source.model, params), record


def _saved_at_once(folder: epath.Path) -> str:
  """Says what is left if steps or a save were under way, and how to go on."""
  return (
      "ended at once, without what was done since the newest checkpoint (a save that was under "
      f"way is cleared by the next start): {folders.describe_saved(folder)}"
  )


def _saving_hook(
    config: ExperimentConfig, checkpoints: Checkpoints, batches: PassingOver, recorder: Recorder,
    evaluations: Evaluations, lock: RunLock | None, guarding: Guarding,
    logger: Logger,
) -> Hook:
  """Makes the hook that saves, ranked by held-out loss, while the folder is still the run's."""

  def heldout_loss(moment: Moment) -> float | None:
    if lock:
      lock.check()
    # An interrupted run has no time to score, and a checkpoint in between no rank.
    in_between = moment.step % config.train.checkpoint_every and moment.step < config.train.steps
    if moment.interrupted or in_between or not config.train.keep_best:
      return None
    return evaluations.heldout_loss(moment)

  hook = checkpoint_hook(
      checkpoints, batches, recorder, config.train.checkpoint_every, heldout_loss
  )

  def save(moment: Moment) -> None:
    if guarding.holds_off(moment):
      return
    heldout_loss(moment)  # Before the clock, which is that of saving; the hook takes it from here.
    logger.pause()
    began = time.perf_counter()
    hook.run(moment)
    recorder.write(moment.step, {CHECKPOINT_SECONDS: time.perf_counter() - began})
    logger.resume()

  return dataclasses.replace(hook, run=save)


def _watching(
    lock: RunLock | None, logger: Logger, guarding: Guarding, life: Life
) -> Callable[[int, Metrics], bool]:
  """Makes a callback that logs each step, and says whether the run has to go back.

  It raises once the folder is lost.
  """

  def on_metrics(step: int, metrics: Metrics) -> bool:
    if lock and lock.lost:
      lock.check()
    life.beat(step)
    logger(step, metrics)
    return guarding.look(step, metrics)

  return on_metrics

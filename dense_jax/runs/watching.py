"""Looks at a run from outside, whether it trains, has ended or was killed: for people, as text."""

import dataclasses
import statistics
import time
from collections.abc import Mapping, Sequence

from etils import epath

from dense_jax import experiment
from dense_jax.formatting import printable, scaled
from dense_jax.runs.guarding import PASSED_FILE
from dense_jax.runs.life import ENDED, Heartbeat, read_heartbeat
from dense_jax.runs.recording import CHECKPOINT_SECONDS, DEVICE_MEMORY, GOODPUT, HOST_MEMORY, MFU
from dense_jax.runs.workdir import CHECKPOINTS
from dense_jax.training.events import Event, read_events
from dense_jax.training.guard import SKIPPED
from dense_jax.training.loop import DATA_WAIT, SPEED
from dense_jax.training.metrics import read_metrics
from dense_jax.training.stored import saved_steps

_BAR = 30
# A heartbeat comes every 10 s, in a bucket every 30 s; evaluations and saves may take longer.
_SILENT_SECONDS = 120.0
_LAST_EVENTS = 5
# Records of the last minutes, of which the rate is.
_RECENT = 20


@dataclasses.dataclass(frozen=True)
class Look:
  """The state of a run, seen from outside at one time.

  Attributes:
    time: when it was looked at, in seconds since 1970.
    steps: steps in all.
    step: steps done, as far as the run has said.
    tokens_per_step: the tokens of a step, padding included.
    heartbeat: what the run said last; None if it never did.
    newest: name -> newest number in metrics.jsonl.
    rate: tokens per second, the median of the last records; None if there is none yet.
    checkpoints: the steps of complete checkpoints.
    events: what happened, the oldest first.
  """

  time: float
  steps: int
  step: int
  tokens_per_step: int
  heartbeat: Heartbeat | None
  newest: Mapping[str, float]
  rate: float | None
  checkpoints: Sequence[int]
  events: Sequence[Event]

  @property
  def has_ended(self) -> bool:
    """True if no process trains, as it has said, or as all steps are done."""
    return self.step == self.steps if self.heartbeat is None else self.heartbeat.doing == ENDED

  @property
  def is_silent(self) -> bool:
    """True if the run has not said for long that it trains, nor that it has ended."""
    beat = self.heartbeat
    return beat is not None and not self.has_ended and self.time - beat.time > _SILENT_SECONDS

  @property
  def is_well(self) -> bool:
    """True if all steps are done, or a process trains."""
    return self.step == self.steps or not (self.has_ended or self.is_silent)

  @property
  def doing(self) -> str:
    """The words that say what the run is doing, or how it ended."""
    beat = self.heartbeat
    if beat is None:
      return "done" if self.step == self.steps else "has not begun to train"
    if self.has_ended:
      last = self.events[-1] if self.events else None
      return "done" if self.step == self.steps else f"ended ({last.kind if last else 'no reason'})"
    if self.is_silent:
      return f"silent: killed, or it hangs ({beat.doing} when it was last heard of)"
    return beat.doing

  @property
  def seconds_left(self) -> float | None:
    """The time that the rest takes at the present rate; None if there is no rate."""
    if not self.rate:
      return None
    return (self.steps - self.step) * self.tokens_per_step / self.rate

  def text(self) -> str:
    """Returns what is seen, in lines."""
    done = round(_BAR * self.step / self.steps)
    lines = [
        f"step {self.step:,} of {self.steps:,}  [{'#' * done}{'.' * (_BAR - done)}] "
        f"{self.step / self.steps:.1%}  {self.doing}"
    ]
    rows = [
        ("loss", self._losses()), ("speed", self._speed()), ("time", self._time()),
        ("skipped", self._skipped()), ("memory", self._memory()),
        ("checkpoint", self._checkpoint()), ("heartbeat", self._heartbeat()),
    ]
    lines += [f"{name.ljust(10)}  {value}" for name, value in rows if value]
    for event in self.events[-_LAST_EVENTS:]:
      lines.append(f"{clock(event.time)}  step {event.step}  {event.kind}: {printable(event.text)}")
    return "\n".join(lines)

  def _number(self, name: str, form: str, unit: str = "") -> str:
    value = self.newest.get(name)
    return "" if value is None else f"{value:{form}}{unit}"

  def _losses(self) -> str:
    training, heldout = self._number("loss", ".4f"), self._number("heldout_loss", ".4f")
    norm = self._number("grad_norm", ".3g")
    return _listed(training, heldout and f"held-out {heldout}", norm and f"gradient norm {norm}")

  def _speed(self) -> str:
    mfu, wait = self._number(MFU, ".1%"), self._number(DATA_WAIT, ".1%")
    return _listed(
        "" if self.rate is None else f"{self.rate:,.0f} tokens/s", mfu and f"MFU {mfu}",
        wait and f"waits for data {wait} of the time",
    )

  def _time(self) -> str:
    goodput = self._number(GOODPUT, ".1%")
    left = self.seconds_left
    ends = "" if left is None or not left else f"{duration(left)} left"
    return _listed(ends, goodput and f"goodput {goodput}")

  def _skipped(self) -> str:
    count = self._count("returned")
    skipped = self._number(SKIPPED, ",.0f")
    return _listed(
        skipped and f"steps: {skipped}",
        f"returns to a checkpoint: {count} ({PASSED_FILE})" if count else "",
    )

  def _memory(self) -> str:
    sizes = [(DEVICE_MEMORY, "device"), (HOST_MEMORY, "host")]
    return _listed(*(
        f"{what} {scaled(self.newest[name], 'B')}" for name, what in sizes if name in self.newest
    ))

  def _checkpoint(self) -> str:
    took = self._number(CHECKPOINT_SECONDS, ".2g", " s")
    if not self.checkpoints:
      return "none yet"
    return _listed(f"step {self.checkpoints[-1]:,}", took and f"training stood still for {took}")

  def _heartbeat(self) -> str:
    beat = self.heartbeat
    if beat is None or self.has_ended:
      return ""
    return f"{duration(self.time - beat.time)} ago, process {beat.pid} on {printable(beat.host)}"

  def _count(self, kind: str) -> int:
    return sum(event.kind == kind for event in self.events)


def look(workdir: epath.Path) -> Look:
  """Looks at a run, which may train at the same time; changes nothing.

  Raises:
    InputError: the folder holds no run.
  """
  config = experiment.read(workdir)
  records = read_metrics(workdir)
  newest: dict[str, float] = {}
  for record in records:
    newest |= record
  speeds = [record[SPEED] for record in records if SPEED in record][-_RECENT:]
  beat, checkpoints = read_heartbeat(workdir), saved_steps(workdir / CHECKPOINTS)
  known = [int(newest.get("step", 0)), *checkpoints[-1:], *([beat.step] if beat else [])]
  return Look(
      time.time(), config.train.steps, max(known),
      config.train.batch_size * config.data.seq_len, beat, newest,
      statistics.median(speeds) if speeds else None, checkpoints, read_events(workdir),
  )


def duration(seconds: float) -> str:
  """Formats a duration, such as "3 d 4 h", "12 min 5 s" or "7 s"."""
  left = round(max(seconds, 0))
  parts: list[str] = []
  for size, unit in ((86400, "d"), (3600, "h"), (60, "min"), (1, "s")):
    count, left = divmod(left, size)
    if count or (unit == "s" and not parts):
      parts.append(f"{count} {unit}")
  return " ".join(parts[:2])


def clock(seconds: float) -> str:
  """Formats a time, given in seconds since 1970, in this machine's zone."""
  return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _listed(*parts: str) -> str:
  return ", ".join(part for part in parts if part)

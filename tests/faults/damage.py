"""Damage to each file of the newest checkpoint, in one process that restores again and again.

The state that is restored is compared, bit by bit, with that of the step that it is said to be.
From a state and a position that are equal, the run goes on equally: that is what the kills show.
"""

import json
import os
import pathlib
import random
import shutil
from collections.abc import Callable, Iterator
from typing import Any

from tests.faults import runs
from tests.faults.children import Start, Trial, command
from tests.faults.runs import EVERY, STEPS, Base, Outcome

FLIPPED, CUT, ZEROS, DELETED = (
    "a bit of a file flipped", "a file truncated", "zeros in a file", "a file or folder deleted"
)


def flip(file: pathlib.Path, rng: random.Random) -> None:
  content = bytearray(file.read_bytes())
  content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
  file.write_bytes(bytes(content))


def _cut(file: pathlib.Path, rng: random.Random) -> None:
  os.truncate(file, rng.randrange(file.stat().st_size))


def _zero(file: pathlib.Path, rng: random.Random) -> None:
  size = file.stat().st_size
  first = rng.randrange(size)
  with open(file, "r+b") as opened:
    opened.seek(first)
    opened.write(bytes(min(size - first, rng.choice([8, 512, 4096]))))


def _delete(place: pathlib.Path, rng: random.Random) -> None:
  del rng
  shutil.rmtree(place) if place.is_dir() else place.unlink()


# Row -> (the damage, how often for each file of a whole campaign, whether to folders as well).
KINDS: dict[str, tuple[Callable[[pathlib.Path, random.Random], None], int, bool]] = {
    FLIPPED: (flip, 8, False), CUT: (_cut, 2, False), ZEROS: (_zero, 2, False),
    DELETED: (_delete, 1, True),
}


def trial(base: Base, run: pathlib.Path, seed: int, share: float) -> Trial:
  """Damages each file of a run's newest checkpoint, on a copy each.

  Args:
    base: its folder.
    run: a finished run, whose checkpoints are of several steps.
    seed: of what is random.
    share: the share of all damages that are tried.
  """
  report = base.folder / "damage.json"
  [child] = yield [Start(lambda: _restore_damaged(run, base.folder, seed, share, report))]
  if child.status:
    return [Outcome(FLIPPED, 0, runs.tail(child))]
  return [Outcome(row, tries, "; ".join(wrong[:3]), tuple(lost))
          for row, (tries, wrong, lost) in json.loads(report.read_text()).items()]


def _restore_damaged(
    run: pathlib.Path, folder: pathlib.Path, seed: int, share: float, report: pathlib.Path
) -> int:
  """Runs in a child; writes row -> [tries, what was wrong, steps lost]."""
  import jax
  from etils import epath

  from dense_jax import experiment, sharding
  from dense_jax.training.checkpoint import Checkpoints, clear_uncommitted
  from dense_jax.training.checkpoint_reader import CheckpointReader
  from dense_jax.training.step import Trainer

  config = experiment.read(epath.Path(run))
  shapes = Trainer(config, sharding.make_mesh(config.mesh)).state_shapes
  source = run / "checkpoints"
  whole = {
      step: jax.device_get(CheckpointReader(epath.Path(source), config.model).restore(shapes, step))
      for step in runs.saved(run)
  }

  def restore(copy: pathlib.Path, told: list[str]) -> Any:
    def tell(step: int, kind: str, text: str) -> None:
      told.append(text)

    clear_uncommitted(epath.Path(copy), tell)
    checkpoints = Checkpoints(epath.Path(copy), config.model, keep_last=9, tell=tell)
    try:
      return jax.device_get(checkpoints.restore_newest(shapes))
    finally:
      checkpoints.close()

  rows = {
      row: _damage(row, source, folder, random.Random(f"{row} {seed}"), share, whole, restore)
      for row in KINDS
  }
  report.write_text(json.dumps(rows))
  return 0


def _damage(
    row: str, source: pathlib.Path, folder: pathlib.Path, rng: random.Random, share: float,
    whole: dict[int, Any], restore: Callable[[pathlib.Path, list[str]], Any],
) -> tuple[int, list[str], list[int]]:
  """Damages each file in turn, restores and compares; returns tries, faults and steps lost."""
  from dense_jax.errors import InputError

  damage, times, folders = KINDS[row]
  tries, wrong, lost = 0, [], []
  for place in sorted(_places(source / str(max(whole)), folders)):
    for _ in range(times):
      if rng.random() >= share:
        continue
      tries += 1
      copy = folder / f"damaged-{os.getpid()}" / "checkpoints"
      shutil.copytree(source, copy)
      name = place.relative_to(source)
      damage(copy / name, rng)
      told: list[str] = []
      step = max(whole)
      try:
        restored = restore(copy, told)
        step = int(restored[0].step)
        wrong += _judge(name, step, restored, whole, told)
      except InputError as error:
        wrong.append(f"{name}: none was used: {error}")
      except Exception as error:
        wrong.append(f"{name}: {type(error).__name__}: {error}")
      lost.append(max(whole) - step)
      shutil.rmtree(copy.parent)
  return tries, wrong, lost


def _places(folder: pathlib.Path, folders: bool) -> Iterator[pathlib.Path]:
  for place in folder.rglob("*"):
    if place.is_dir() if folders and place.is_dir() else place.is_file() and place.stat().st_size:
      yield place


def _judge(name, step, restored, whole, told) -> list[str]:
  """Says what was wrong with a restored state: silence, or other bits."""
  import jax
  import numpy as np

  expected = whole[step]
  same = jax.tree.structure(restored) == jax.tree.structure(expected) and all(
      np.asarray(one).tobytes() == np.asarray(other).tobytes()
      for one, other in zip(jax.tree.leaves(restored), jax.tree.leaves(expected), strict=True)
  )
  if not same:
    return [f"{name}: step {step} was restored with other bits"]
  if step < max(whole) and not any(f"checkpoint {max(whole)} in" in text for text in told):
    return [f"{name}: step {step} was taken in silence"]
  return []


ALONG = "a damaged newest checkpoint, the whole run"


def whole_runs(base: Base, run: pathlib.Path, seed: int, count: int) -> Iterator[Trial]:
  """Yields runs that end, lose a part of their newest checkpoint, and go on by the same command."""
  rng = random.Random(seed)
  for index in range(count):
    # The largest file holds arrays; a random one may hold bytes that mean nothing.
    largest = index % 2 == 0
    yield _along(base, run, base.folder / f"along-{index}", rng.choice([*KINDS]), rng, largest)


def _along(
    base: Base, run: pathlib.Path, workdir: pathlib.Path, row: str, rng: random.Random,
    largest: bool,
) -> Trial:
  shutil.copytree(run, workdir)
  newest = workdir / "checkpoints" / str(STEPS)
  files = sorted((newest / "params").rglob("d/*"))
  place = max(files, key=lambda file: file.stat().st_size) if largest else rng.choice(files)
  KINDS[row][0](place, rng)
  [checked] = yield [Start(command("verify", "--workdir", str(workdir)))]
  [read] = yield [Start(command("evaluate", "--workdir", str(workdir), "--checkpoint",
                                str(STEPS)))]
  [child] = yield [base.train(workdir)]
  began = runs.went_on_from(child)
  aside = (workdir / "checkpoints.damaged" / str(STEPS)).is_dir()
  told = f"checkpoint {STEPS} in" in child.said
  # Some bytes mean nothing, such as those of a time: then all agree that nothing is damaged.
  expected = (0, 0, STEPS, False, False)
  if checked.status or largest:
    expected = (2, 2, STEPS - EVERY, True, True)
  found = (checked.status, read.status, began, told, aside)
  wrong = "" if found == expected else f"{place}: {found} instead of {expected}: {runs.tail(child)}"
  return Outcome(ALONG, 1, wrong or base.difference(workdir), (STEPS - (began or 0),))

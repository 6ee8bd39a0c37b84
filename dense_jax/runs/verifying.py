"""Checks that the checkpoints of a run are what was saved, in the host's memory, without a mesh."""

import dataclasses
import os

import jax

from dense_jax.config import invalid
from dense_jax.files import make_path
from dense_jax.runs.workdir import CHECKPOINTS
from dense_jax.training import stored
from dense_jax.training.proof import ArrayProof, prove
from dense_jax.training.stored import DamagedError, Stored, saved_steps


@dataclasses.dataclass(frozen=True)
class Verdict:
  """A finding about a checkpoint.

  Attributes:
    step: its step.
    damage: what is damaged; "" if nothing is.
    proven: whether its digests were compared; false if it was saved without them.
    arrays: the number of arrays that were read.
    num_bytes: their size.
  """

  step: int
  damage: str
  proven: bool
  arrays: int = 0
  num_bytes: int = 0

  def describe(self) -> str:
    """Returns a line for people."""
    if self.damage:
      return f"step {self.step}: DAMAGED: {self.damage}"
    what = f"{self.arrays} arrays, {self.num_bytes / 2**20:,.1f} MiB, all numbers finite"
    if self.proven:
      return f"step {self.step}: whole: {what}, as they were saved"
    return f"step {self.step}: readable, but saved without digests, so not proven: {what}"


def verify(workdir: str | os.PathLike[str], checkpoint: str = "all") -> list[Verdict]:
  """Reads checkpoints of a run and compares them with their digests; changes nothing.

  A checkpoint is read item by item into this host's memory. One that a training run deletes
  meanwhile is left out.

  Args:
    workdir: the folder that training wrote, local or in a bucket.
    checkpoint: "all", "latest" or a step's number.

  Returns:
    A verdict on each checkpoint, in the order of their steps.

  Raises:
    InputError: there is no such run or checkpoint.
  """
  folder = make_path(os.fspath(workdir), "--workdir") / CHECKPOINTS
  steps = saved_steps(folder)
  if not steps:
    raise invalid("--workdir", os.fspath(workdir), "a run that has a checkpoint; it has none")
  chosen = {"all": steps, "latest": steps[-1:]}.get(
      checkpoint, [step for step in steps if str(step) == checkpoint]
  )
  if not chosen:
    raise invalid("--checkpoint", checkpoint, f"all, latest or one of {', '.join(map(str, steps))}")
  with jax.default_device(jax.local_devices(backend="cpu")[0]):
    verdicts = [_verdict(Stored(folder, step)) for step in chosen]
  return [verdict for verdict in verdicts if verdict is not None]


def _verdict(checkpoint: Stored) -> Verdict | None:
  proven = False
  try:
    checkpoint.check_commit()
    proof = checkpoint.proof()
    proven = proof is not None
    names = proof.arrays if proof else [stored.PARAMS, stored.OPTIMIZER]
    items = sorted({name.partition("/")[0] for name in names})
    if proof is None and checkpoint.has(stored.EMA, None):
      items.append(stored.EMA)
    found: dict[str, ArrayProof] = {}
    infinite: list[str] = []
    num_bytes = 0
    for item in items:
      arrays = {item: checkpoint.read_all(item)}
      num_bytes += sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))
      digests, wrong = prove(arrays)
      found |= digests
      infinite += wrong
    if proof is not None and found.keys() != proof.arrays.keys():
      raise checkpoint.damaged("it holds other arrays than were saved")
    checkpoint.check(proof, found, infinite)
    checkpoint.check_steps(checkpoint.step, checkpoint.position(proof))
    checkpoint.check_loss(proof)
  except DamagedError as error:
    if not checkpoint.folder.is_dir():  # It was deleted meanwhile.
      return None
    return Verdict(checkpoint.step, error.what, proven)
  return Verdict(checkpoint.step, "", proven, len(found), num_bytes)

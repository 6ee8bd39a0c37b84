"""A checkpoint as it lies in its folder: its parts, how they are read, and what is wrong with them.

Nothing here waits for other processes, and nothing but `set_aside` changes a file.
"""

import contextlib
import dataclasses
import errno
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from dense_jax.errors import InputError
from dense_jax.files import parse_json
from dense_jax.training.proof import ArrayProof, Proof, digest_json, map_named, names
from dense_jax.types import PyTree

T = TypeVar("T")

PARAMS, OPTIMIZER, EMA, DATA, DIGESTS, METRICS = (
    "params", "optimizer", "ema", "data", "digests", "metrics"
)
HELDOUT_LOSS = "heldout_loss"
# The name of the guard's state beside the data's position.
GUARD = "guard"
_COMMIT_FILE = "_CHECKPOINT_METADATA"
# Only these errors of a file system mean that a file is not as it was saved. After others, such as
# a missing permission or a server that does not answer, it may be whole.
_MISSING = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EISDIR})
_NOT_DAMAGE = re.compile(
    r"\b(PERMISSION_DENIED|UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|UNAUTHENTICATED)\b"
)
_MOST_NAMED = 5


class DamagedError(InputError):
  """A checkpoint cannot be read, or is not what was saved.

  Attributes:
    what: which part of it, and what is wrong with it.
  """

  def __init__(self, message: str, what: str = "") -> None:
    super().__init__(message)
    self.what = what


class UnreadableError(DamagedError):
  """Files of a checkpoint are missing or cannot be parsed, as when it is being deleted."""


class UnfitError(InputError):
  """A checkpoint does not hold what is to be restored, such as that of another model."""


def saved_steps(folder: epath.Path) -> list[int]:
  """Returns the steps of the complete checkpoints in a folder, in order; changes nothing there."""
  if not folder.is_dir():
    return []
  return sorted(ocp.utils.checkpoint_steps(folder))


@dataclasses.dataclass(frozen=True)
class Stored:
  """A complete checkpoint.

  Attributes:
    checkpoints: the folder of all checkpoints.
    step: its step.
  """

  checkpoints: epath.Path
  step: int

  @property
  def folder(self) -> epath.Path:
    """The checkpoint's folder."""
    return self.checkpoints / str(self.step)

  def damaged(self, what: str) -> DamagedError:
    """Makes the error that says what is damaged, and which other checkpoints there are."""
    return DamagedError(
        f"checkpoint {self.step} in {self.checkpoints} is damaged: {what}.{self._others()}", what
    )

  def _others(self) -> str:
    others = [str(step) for step in saved_steps(self.checkpoints) if step != self.step]
    return f" Others there: {', '.join(others) or 'none'}"

  def proof(self) -> Proof | None:
    """Returns what the checkpoint was when it was saved; None if it was saved without digests.

    Raises:
      DamagedError: it was saved with digests, but they are missing or damaged.
    """
    folder = self.folder / DIGESTS
    if not folder.exists() and DIGESTS not in self._items():
      return None
    proof = self._parsed(DIGESTS, Proof.parse)
    if proof.step != self.step:
      raise self.damaged(f"{DIGESTS}/metadata: it is that of step {proof.step}")
    return proof

  def _parsed(self, item: str, parse: Callable[[bytes], T]) -> T:
    file = self.folder / item / "metadata"
    try:
      return parse(file.read_bytes())
    except (OSError, ValueError) as error:
      if not _is_damage(error):
        raise
      if isinstance(error, OSError):
        raise self._unreadable(error) from error
      raise self.damaged(f"{item}/{file.name} ({error})") from error

  def position(self, proof: Proof | None) -> dict[str, Any]:
    """Returns the position in the data.

    Raises:
      DamagedError: it cannot be read, or is another one than was saved.
    """
    position = self._parsed(DATA, _parse_object)
    if proof is not None and digest_json(position) != proof.data:
      raise self.damaged(f"{DATA}/metadata: the position in the data is not what was saved")
    return position

  def loss(self, proof: Proof | None) -> float | None:
    """Returns the held-out loss that ranks the checkpoint, or None.

    Raises:
      DamagedError: a checkpoint without digests has a loss that cannot be read.
    """
    if proof is not None:
      return proof.heldout_loss
    file = self.folder / METRICS / METRICS
    try:
      loss = parse_json(file.read_bytes())[HELDOUT_LOSS]
      return loss if math.isfinite(loss) else None
    except FileNotFoundError:
      return None
    except (OSError, KeyError, OverflowError, TypeError, ValueError) as error:
      raise self.damaged(f"{METRICS}/{METRICS} ({error})") from error

  def has(self, item: str, proof: Proof | None) -> bool:
    """Returns whether a checkpoint was saved with an item, which may be damaged now."""
    if proof is not None:
      return any(name.startswith(f"{item}/") for name in proof.arrays)
    return item in self._items() or (self.folder / item).is_dir()

  def _items(self) -> Iterable[str]:
    """Returns the items that were saved, as far as that is known."""
    try:
      return [*parse_json((self.folder / _COMMIT_FILE).read_bytes())["item_handlers"]]
    except (OSError, KeyError, TypeError, ValueError):  # DamagedError.
      return ()

  def check_fits(self, items: Mapping[str, PyTree], proof: Proof | None) -> None:
    """Checks that the checkpoint holds the arrays of `items`, and no others in the same items.

    Args:
      items: item -> tree of the shapes that are to be restored. Dtypes may differ.
      proof: the checkpoint's proof.

    Raises:
      UnfitError: arrays are missing, too many or of other shapes; the error lists them.
      DamagedError: what a checkpoint without digests holds cannot be read.
    """
    wanted = {name: tuple(leaf.shape) for name, leaf in names(dict(items)).items()}
    saved = {
        name: array.shape for name, array in self._arrays(items, proof).items()
        if name.partition("/")[0] in items
    }
    shapes = [
        f"{name} {list(saved[name])} instead of {list(wanted[name])}"
        for name in wanted.keys() & saved.keys() if saved[name] != wanted[name]
    ]
    said = [
        f"{what}: {_listed(found)}"
        for what, found in (
            ("it lacks", wanted.keys() - saved.keys()),
            ("it also holds", saved.keys() - wanted.keys()),
            ("it holds other shapes", shapes),
        ) if found
    ]
    if said:
      raise UnfitError(
          f"checkpoint {self.step} in {self.checkpoints} is of another model or optimizer: "
          f"{'; '.join(said)}. Expected the config.model and config.optimizer of its run"
      )

  def _arrays(
      self, items: Iterable[str], proof: Proof | None
  ) -> Mapping[str, Any]:
    """Returns objects with the shapes of the saved arrays, by name."""
    if proof is not None:
      return proof.arrays
    handler = ocp.StandardCheckpointHandler()
    with self._reading():
      found = names({item: handler.metadata(self.folder / item).tree for item in items})
    return {name: leaf for name, leaf in found.items() if hasattr(leaf, "shape")}

  def with_saved_dtypes(
      self, items: Mapping[str, PyTree], proof: Proof | None
  ) -> dict[str, PyTree]:
    """Returns the same shapes with the dtypes that the arrays were saved in, if that is known."""
    arrays = {} if proof is None else proof.arrays

    def convert(name: str, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
      if name not in arrays or arrays[name].dtype == str(leaf.dtype):
        return leaf
      return jax.ShapeDtypeStruct(
          leaf.shape, jnp.dtype(arrays[name].dtype), sharding=leaf.sharding
      )

    return map_named(convert, dict(items))

  def read(self, items: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """Reads items onto the devices.

    Args:
      items: item -> tree of shapes, with shardings.

    Raises:
      DamagedError: a file is missing, damaged or of another form.
    """
    handler = ocp.StandardCheckpointHandler()
    with self._reading():
      return {
          item: handler.restore(self.folder / item, args=ocp.args.StandardRestore(shapes))
          for item, shapes in items.items()
      }

  def read_all(self, item: str) -> PyTree:
    """Reads an item as it was saved, as numpy arrays.

    Raises:
      DamagedError: a file is missing or damaged.
    """
    handler = ocp.PyTreeCheckpointHandler()
    with self._reading():
      tree = handler.metadata(self.folder / item).tree
      whole = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
      return handler.restore(self.folder / item, args=ocp.args.PyTreeRestore(restore_args=whole))

  @contextlib.contextmanager
  def _reading(self) -> Iterator[None]:
    """Turns errors of reading into `DamagedError`, unless another try may help."""
    try:
      yield
    except (InputError, jax.errors.JaxRuntimeError):
      raise  # The latter is a device's, such as a lack of memory.
    except Exception as error:  # Orbax has no class for errors of reading.
      if not _is_damage(error):
        raise
      raise self._unreadable(error) from error

  def _unreadable(self, error: Exception) -> UnreadableError:
    return UnreadableError(
        f"checkpoint {self.step} in {self.checkpoints} cannot be read: it is damaged, or was "
        f"deleted just now ({first_line(error)}).{self._others()}", first_line(error)
    )

  def check(
      self, proof: Proof | None, found: Mapping[str, ArrayProof], infinite: Iterable[str]
  ) -> None:
    """Checks that arrays are what was saved.

    Args:
      proof: the checkpoint's proof.
      found: name -> what was read, from `prove`.
      infinite: the names of arrays that hold numbers that are not finite.

    Raises:
      DamagedError: the error names the arrays.
    """
    saved = proof.arrays if proof else found
    wrong = [name for name, array in found.items() if saved.get(name) != array]
    if wrong:
      verb = "is" if len(wrong) == 1 else "are"
      raise self.damaged(f"{_listed(wrong)} {verb} not what was saved")
    if infinite := [*infinite]:
      raise self.damaged(f"{_listed(infinite)}: not all numbers are finite")

  def check_steps(self, step: int, position: Mapping[str, Any]) -> None:
    """Checks that the state and the position in the data are those of the same step.

    Raises:
      DamagedError: they are not.
    """
    if position.get("step", step) != step:
      raise self.damaged(
          f"{DATA}/metadata: the position in the data is that of step {position['step']!r}, the "
          f"state is that of step {step}"
      )

  def check_loss(self, proof: Proof | None) -> None:
    """Checks that the file of the held-out loss is what was saved, although nothing reads it then.

    Raises:
      DamagedError: it is not.
    """
    if proof is not None and self.loss(None) != proof.heldout_loss:
      raise self.damaged(f"{METRICS}/{METRICS}: the held-out loss is not what was saved")

  def check_commit(self) -> None:
    """Checks that the file by which a checkpoint is committed can be read.

    Raises:
      DamagedError: it cannot; orbax would open no checkpoint beside it.
    """
    file = self.folder / _COMMIT_FILE
    try:
      _parse_object(file.read_bytes())
      found = ocp.path.step.standard_name_format().find_step(self.checkpoints, self.step)
      found.commit_timestamp.timestamp()
    except Exception as error:  # Orbax has no class for errors of reading.
      if not _is_damage(error):
        raise
      why = error.strerror if isinstance(error, OSError) else first_line(error)
      raise self.damaged(f"{_COMMIT_FILE} ({why})") from error


def set_aside(stored: Stored) -> epath.Path:
  """Renames a checkpoint's folder, out of the folder of all checkpoints; returns its new path."""
  beside = stored.checkpoints.with_name(f"{stored.checkpoints.name}.damaged")
  beside.mkdir(parents=True, exist_ok=True)
  number, place = 1, beside / str(stored.step)
  while place.exists():
    number += 1
    place = beside / f"{stored.step}-{number}"
  stored.folder.rename(place)
  return place


def _is_damage(error: BaseException | None) -> bool:
  """Returns whether an error of reading means that a file is damaged or missing."""
  while error is not None:
    if isinstance(error, MemoryError) or _NOT_DAMAGE.search(str(error)):
      return False
    number = re.search(r"\[os_error_code='(\d+)'\]", str(error))
    code = int(number[1]) if number else (error.errno if isinstance(error, OSError) else None)
    if code is not None and code not in _MISSING:
      return False
    error = error.__cause__ or error.__context__
  return True


def _parse_object(content: bytes) -> dict[str, Any]:
  values = parse_json(content)
  if not isinstance(values, dict):
    raise ValueError("it is no JSON object")
  return values


def first_line(error: BaseException) -> str:
  """Returns the beginning of an error's message, for a sentence."""
  return str(error).strip().partition("\n")[0][:200]


def _listed(found: Iterable[str]) -> str:
  """Returns names in order, the first few of them."""
  ordered = sorted(found)
  more = len(ordered) - _MOST_NAMED
  return ", ".join(ordered[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


"""The history of a run in tables: starts, kills, skipped steps, returns, checkpoints set aside."""

from collections import Counter
from collections.abc import Sequence

from dense_jax.formatting import printable
from dense_jax.runs.watching import clock
from dense_jax.training.events import Event

# The most events that a page shows: the last ones.
_MOST = 200
# Kind -> what one of its events, or several, are called in a sentence.
_COUNTED = {
    "start": "starts", "killed": "kills", "interrupted": "interruptions", "failed": "failures",
    "skipped": "times that steps were skipped", "returned": "returns to a checkpoint",
    "stopped": "stops of the guard", "set aside": "checkpoints set aside",
    "save failed": "failed saves", "hung": "times that it hung",
}


def summary(events: Sequence[Event]) -> str:
  """Says in a sentence how often what happened; "" if nothing was recorded."""
  counts = Counter(event.kind for event in events)
  said = [f"{name}: {counts[kind]}" for kind, name in _COUNTED.items() if counts[kind]]
  return f"{', '.join(said)}." if said else ""


def rows(events: Sequence[Event]) -> list[tuple[str, str, str, str]]:
  """Returns a table of the last events, the oldest first, with its header."""
  shown = events[-_MOST:]
  table = [("time", "step", "what", "in words")]
  if len(shown) < len(events):
    table.append(("", "", "", f"{len(events) - len(shown)} earlier events are left out"))
  for event in shown:
    table.append((clock(event.time), str(event.step), event.kind, printable(event.text)))
  return table

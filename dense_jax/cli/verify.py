"""Checks that the checkpoints of a run are what was saved."""

from collections.abc import Sequence

from dense_jax import runs
from dense_jax.cli import common

_EPILOG = """
Each checkpoint is read, its arrays are compared with the digests that were saved with them, all
numbers have to be finite, and the position in the data has to be that of the state. Nothing is
changed. A checkpoint that was saved before there were digests is read, and said not to be proven.

The status is 0 if none is damaged, and 2 if one is. Training passes over damaged checkpoints by
itself: it sets them aside, in checkpoints.damaged, and goes on from the newest whole one.
"""


def main(arguments: Sequence[str]) -> int:
  """Prints a line for each checkpoint; returns 2 if one is damaged."""
  command = common.parser("verify", "Are a run's checkpoints what was saved?")
  command.epilog = _EPILOG
  command.add_argument("--workdir", required=True, help="the run's folder")
  command.add_argument("--checkpoint", default="all", metavar="WHICH",
                       help="all (default), latest or a step")
  options = command.parse_args(arguments)
  verdicts = runs.verify(options.workdir, options.checkpoint)
  for verdict in verdicts:
    print(verdict.describe())
  return 2 if any(verdict.damage for verdict in verdicts) else 0


if __name__ == "__main__":
  common.run(main)

"""Shows a run in the terminal: how far it is, how it does, what happened."""

import sys
import time
from collections.abc import Sequence

from dense_jax.cli import common
from dense_jax.config import invalid
from dense_jax.files import make_path
from dense_jax.runs.watching import look

_EPILOG = """
The run may be training on another machine, have ended, or have been killed: only its folder is
read. Ends when the run has; --once looks once. On a terminal the text is written over the one
before. A run counts as silent if it has said nothing for two minutes.
"""
# Moves a terminal's cursor to its upper left corner, and clears what follows.
_AGAIN = "\x1b[H\x1b[J"


def main(arguments: Sequence[str]) -> int:
  """Shows the run until it ends; returns 0 if its steps are done or it still trains, else 1."""
  command = common.parser("watch", "Shows how a run does, while it trains or after it.")
  command.epilog = _EPILOG
  command.add_argument("--workdir", required=True, help="the folder that training writes")
  command.add_argument("--once", action="store_true", help="look once, for scripts")
  command.add_argument("--every", type=float, default=5.0, metavar="SECONDS",
                       help="seconds between two looks (default 5)")
  options = command.parse_args(arguments)
  if not 0 < options.every <= 86400:
    raise invalid("--every", options.every, "a number > 0 and <= 86400")
  folder = make_path(options.workdir, "--workdir")
  over = _AGAIN if sys.stdout.isatty() and not options.once else ""
  while True:
    seen = look(folder)
    print(f"{over}{seen.text()}", flush=True)
    if options.once or seen.has_ended:
      return 0 if seen.is_well else 1
    time.sleep(options.every)


if __name__ == "__main__":
  common.run(main)

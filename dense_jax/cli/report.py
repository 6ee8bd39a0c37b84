"""Reports on a run: scores beside baselines, samples, and a plot of its losses."""

from collections.abc import Sequence

from dense_jax import runs
from dense_jax.cli import common
from dense_jax.config import invalid

_EPILOG = """
Runs on one device, at any time after the run's first checkpoint, also while it trains. Writes
loss.png, report.md and report.html, one page that needs no network, into the run's folder. Both say
what happened to the run: starts, kills, skipped steps, returns. The page shows the figures of
`dense-jax analyze` too, if that ran before.
"""


def main(arguments: Sequence[str]) -> int:
  """Prints the table, the samples, and the paths of the plot and the report."""
  command = common.parser("report", "A run's scores beside baselines, samples and plot.")
  command.epilog = _EPILOG
  common.add_checkpoint_arguments(command)
  command.add_argument(
      "--batches", type=int, default=200, metavar="N",
      help="score at most N batches of the held-out text, spread over it (default 200); 0 scores "
      "all",
  )
  command.add_argument("--batch-size", type=int, default=16,
                       help="windows at a time (default 16); more than there are take all")
  command.add_argument("--beside", nargs="+", default=[], metavar="FOLDER",
                       help="other runs, which the page compares with")
  options = command.parse_args(arguments)
  if options.batches < 0:
    raise invalid("--batches", options.batches, "an integer >= 0")
  if options.batch_size < 1:
    raise invalid("--batch-size", options.batch_size, "an integer >= 1")
  report = runs.write_report(
      options.workdir, options.checkpoint, options.weights, batches=options.batches,
      batch_size=options.batch_size, beside=options.beside,
  )
  print(f"step {report.step}: {report.score.describe()}")
  print(f"\n{report.text}\n\nplot      {report.plot}\nreport    {report.file}\n"
        f"page      {report.page}")
  return 0


if __name__ == "__main__":
  common.run(main)

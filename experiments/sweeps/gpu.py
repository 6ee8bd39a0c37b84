"""Sweep: 25M parameters and 24M tokens on one GPU, for a machine that one has for ten minutes.

Here, once. The folder is less than 50 MB, and all that travels besides the repository and wheels of
what the other machine lacks (grain, array-record, ml-collections and tensorboardX are 5 MB):

          python -m dense_jax.cli.tokenize --config experiments/evidence.py:25m \
              --tokens 23500000 --config.data.path=english_novels_train.jsonl.gz \
              --config.data.heldout_path=english_novels_valid.jsonl.gz --to runs/novels_tokens

There, from the repository's root. The same command goes on where the limit ended it; on another
machine it goes on with the finished runs, if the record is kept:

          python -m dense_jax.cli.sweep experiments/sweeps/gpu.py --workdir runs/sweeps/gpu \
              --jobs 3 --limit-minutes 9 --record experiments/results/evidence_gpu.jsonl \
              --config.data.path=runs/novels_tokens
          python -m dense_jax.sweeps.timing runs/sweeps/gpu/gau_retnet_wider/seed0 \
              runs/sweeps/gpu/gau_retnet_m=2/seed0

Command   as above
Hardware  one H100, 8 GB of its memory a run. Estimates of a step of 16,384 tokens, by
          `dense-jax compile --topology h100:1` and without launches: gau_retnet 19.1 ms, m=2 25.1,
          wider 24.0, mamba2 18.0, and its m=2 about 27 (1.48 of it, as at 350M). 1,464 steps of
          each are 163 s a seed, 490 s in all, besides compilation and evaluation
Order     all cells of seed 0, then of seed 1, then of seed 2; three runs side by side, so that some
          compile while others train. Nine minutes hold two seeds, even if steps take 1.4 times the
          estimate, and at the estimate most of the third; the same command does the rest
Time      "wider" has 0.96 of the step time of m=2, by estimate. The last command measures that, for
          tokens/s of runs side by side are not comparable
Expected  not run: no GPU was there
"""

from dense_jax.experiment import check_argument
from dense_jax.sweeps.definition import Cell, Sweep

DEPTH = "model.dense.depth"
MAMBA2 = {"model.family": "mamba2"}


def get_sweep(arg: str = "") -> Sweep:
  """Returns the sweep; `:debug` is a smoke test of it."""
  debug = check_argument(arg, "debug")
  # The wider model's keys stay as they are: 128 a head suit the kernels, 160 would not.
  wider = {"model.width": 48, "model.mixer.key_dim": 16} if debug else {
      "model.width": 640, "model.mixer.key_dim": 256}
  cells = (
      Cell("gau_retnet"),
      Cell("gau_retnet m=2", {DEPTH: 2}),
      Cell("mamba2", MAMBA2),
      Cell("mamba2 m=2", MAMBA2 | {DEPTH: 2}, base="mamba2"),
      Cell("gau_retnet wider", wider, base="gau_retnet m=2"),
  )
  sweep = Sweep(
      "experiments/evidence.py:25m", cells, "gau_retnet",
      question="Do dense connections gain at 25M parameters, and more than a wider base model?",
  )
  return sweep.debug() if debug else sweep

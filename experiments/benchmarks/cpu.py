"""Speed on a CPU, where possible beside a rival that is measured in the same run.

Command   GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python -m experiments.benchmarks.cpu \
              --authors FOLDER --rival-python OTHER/bin/python \
              --json experiments/results/cpu_DATE.json
Rivals    FOLDER has modeling_dense_gau_retnet.py of the release of DenseSSM, which is not ours to
          ship; without it no figure is over the authors' code. OTHER is an environment with
          pip install torch transformers safetensors; the default is this Python, if it has them
Hardware  two cores, float32
Parts     authors   gau_retnet as the authors train and sample it, beside their PyTorch code and our
                    own quadratic form
          transformers
                    training and decoding of mamba and mamba2 beside transformers' classes
          lengths   training of each family at a constant number of tokens per batch, in rows of
                    increasing length
          modes     a mixer's default form against one associative scan (matrix states: against
                    chunks joined by an associative scan)
          dense     dense over base: times of a train step and of a decoding step, the latter
                    beside the ratio of the bytes that they move
          decode    decoding of each family against a transformer's
          bandwidth memory bandwidth in GB/s of the operations that decoding consists of
          constant  tokens/s at T 32768 over T 2048, rematerialised
Ratios are of speeds, so that more than 1 is faster, except in `dense`, where they are of times.
Each is the median over pairs of steps in turn; both processes of a pair have as many threads.
The columns called "bar" give the ratio that must be reached.
"""

import importlib.util
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from dense_jax.config import invalid
from dense_jax.errors import InputError
from experiments.benchmarks import common, cpu_dense, cpu_lengths, cpu_modes, cpu_rivals
from experiments.benchmarks.common import Table
from experiments.benchmarks.torch_client import Rivals

# Part -> its tables, at toy size or not; those of RIVALS beside other code.
RIVALS: Mapping[str, Callable[[bool, Rivals], Iterator[Table]]] = {
    "authors": cpu_rivals.authors, "transformers": cpu_rivals.transformers,
}
PARTS: Mapping[str, Callable[[bool], Iterator[Table]]] = {
    "lengths": cpu_lengths.lengths,
    "modes": cpu_modes.modes,
    "dense": cpu_dense.dense,
    "decode": cpu_dense.decode,
    "bandwidth": cpu_dense.bandwidth,
    "constant": cpu_lengths.constant,
}


def _rivals(authors: str, python: str) -> Rivals:
  """Returns what is compared with.

  Raises:
    InputError: there is no authors' file, no Python for it, or no program of that name.
  """
  if python and not shutil.which(python):
    raise invalid("--rival-python", python, "a Python that can be run, with torch and transformers")
  has_torch = all(map(importlib.util.find_spec, ("torch", "transformers")))
  rivals = Rivals(authors, python or (sys.executable if has_torch else ""))
  if rivals.modelling_file() and not rivals.python:
    raise InputError(
        "--authors needs torch and transformers, which this Python lacks: expected --rival-python "
        "PYTHON, one with: pip install torch transformers safetensors"
    )
  return rivals


def main(arguments: Sequence[str]) -> None:
  """Runs the parts; prints and records each table when it is done."""
  names = [*RIVALS, *PARTS]
  parser = common.parser(__doc__, "toy sizes")
  parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="PART",
                      help=f"some of {', '.join(names)} (all)")
  parser.add_argument("--authors", default="", metavar="FOLDER",
                      help="the folder with the authors' modeling_dense_gau_retnet.py")
  parser.add_argument("--rival-python", default="", metavar="PYTHON",
                      help="a Python with torch and transformers (this one, if it has them)")
  options = parser.parse_args(arguments)
  results: dict[str, Any] = {}
  try:
    rivals = _rivals(options.authors, options.rival_python)
    print(f"float32, {common.hardware()}\n", flush=True)
    for name in options.only:
      tables = (
          RIVALS[name](options.quick, rivals) if name in RIVALS else PARTS[name](options.quick)
      )
      for table in tables:
        print(table, flush=True)
        results.setdefault(name, {}).update(table.results)
        if options.json:
          common.write_json(options.json, common.record(
              "cpu", arguments,
              "tokens/s, seconds or their ratios; `pytorch` is the rival's, in turn with ours",
              results,
          ))
  except InputError as error:
    parser.error(str(error))


if __name__ == "__main__":
  main(sys.argv[1:])

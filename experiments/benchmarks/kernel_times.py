"""The kernels of a GPU in one traced call, by their kinds: where a step's time goes."""

import collections
import pathlib
import re
import tempfile
from collections.abc import Callable
from typing import Any

import jax

# Kinds of kernels that are listed; the others are small.
LISTED = 16


def trace(call: Callable[[], object]) -> dict[str, Any]:
  """Traces a call, which ends when its results are ready.

  Returns:
    "kernels", kind of kernel -> milliseconds in all, the largest first; "kernel_ms", the
    milliseconds of all kernels; "launches", their number. {} if the device is no GPU.
  """
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      call()
    files = sorted(pathlib.Path(folder).rglob("*.xplane.pb"))
    times: collections.Counter[str] = collections.Counter()
    launches = 0
    for file in files:
      for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
        if not plane.name.startswith("/device:GPU"):
          continue
        for line in plane.lines:
          if line.name.startswith("Stream"):
            for event in line.events:
              times[kind(event.name)] += event.duration_ns / 1e6
              launches += 1
  if not launches:
    return {}
  return {
      "kernels": {name: round(value, 2) for name, value in times.most_common(LISTED)},
      "kernel_ms": round(times.total(), 2),
      "launches": launches,
  }


def kind(name: str) -> str:
  """Returns a kernel's name without the numbers that tell its instances apart."""
  return re.sub(r"_*(_\d+)*$", "", name)

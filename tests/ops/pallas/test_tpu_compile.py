"""The Pallas kernels compile for TPUs, by the real compiler, and need little memory."""

import json
import subprocess
import sys

import pytest

from tests.helpers import ROOT, tpu_compiler_environment

# Program of tpu_kernels.py -> GB of temporaries that it may need on any chip. Found: 0.010 at
# most for one source, 0.048 for three, whose states before chunks are 0.0084 each.
TEMPORARIES = {
    "selective-1-forward": 0.01,
    "selective-1-packed-forward": 0.01,
    "selective-1-gradient": 0.10,
    "selective-1-packed-gradient": 0.10,
    "selective-3-forward": 0.01,
    "selective-3-packed-forward": 0.01,
    "selective-3-gradient": 0.10,
    "selective-3-packed-gradient": 0.10,
}


@pytest.mark.slow
@pytest.mark.tpu_compiler
def test_kernels_compile_for_every_tpu_and_need_little_memory():
  script = ROOT / "tests" / "ops" / "pallas" / "tpu_kernels.py"
  result = subprocess.run(
      [sys.executable, script], env=tpu_compiler_environment(),
      capture_output=True, text=True, timeout=900, check=False,
  )
  assert result.returncode == 0, result.stderr[-4000:]
  found = json.loads(result.stdout.splitlines()[-1])
  assert found.keys() == TEMPORARIES.keys()
  for name, limit in TEMPORARIES.items():
    assert found[name].keys() == {"v4", "v5e", "v5p", "v6e"}
    for tpu, needed in found[name].items():
      assert needed["temporaries"] <= limit * 1e9, (name, tpu, needed)
      # The kernels say what they do; to the compiler they are opaque.
      assert needed["flops"] > 0 and needed["transcendentals"] > 0, (name, tpu, needed)

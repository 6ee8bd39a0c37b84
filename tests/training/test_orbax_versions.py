"""The oldest and the newest orbax that the requirements allow read each other's checkpoints.

Each version is put into a folder of its own, in front of the environment's packages, and runs in
processes of its own.
"""

import functools
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from tests.helpers import ROOT
from tests.xla_flags import FAST_TO_COMPILE

pytestmark = pytest.mark.slow

SCRIPT = """
import sys
import jax, jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from dense_jax.config import ModelConfig
from dense_jax.training import stored
from dense_jax.training.checkpoint import Checkpoints, clear_uncommitted
from dense_jax.training.host_arrays import placed_on
from dense_jax.training.step import TrainState

folder, mode, *actions = sys.argv[1:]
if mode == "commit file":
  # As orbax does it in a bucket, where nothing can be renamed.
  from orbax.checkpoint._src.path import atomicity
  try:
    from orbax.checkpoint._src.path import atomicity_defaults as defaults
  except ImportError:
    defaults = atomicity
  for name in ("get_default_temporary_path_class", "get_item_default_temporary_path_class"):
    if hasattr(defaults, name):
      setattr(defaults, name, lambda path, **options: atomicity.CommitFileTemporaryPath)
folder = epath.Path(folder)

def state(step):
  return TrainState(
      jnp.int32(step), {"w": jnp.arange(6.0).reshape(2, 3) * step, "b": jnp.ones(4, jnp.bfloat16)},
      ({"mu": jnp.full(3, 0.5)}, ()),
  )

for action in actions:
  what, step = action.split(":")
  step = int(step)
  if what == "restore":
    clear_uncommitted(folder)
  checkpoints = Checkpoints(folder, ModelConfig(), keep_last=9)
  if what == "save":
    assert checkpoints.save(state(step), step, {"step": step}, 2.0 / step)
    checkpoints.wait()
  else:
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    restored, position = checkpoints.restore_newest(placed_on(state(0), place))
    assert position == {"step": step}, position
    same = jax.tree.map(lambda one, other: bool((one == other).all()), restored, state(step))
    assert all(jax.tree.leaves(same)), same
    assert stored.saved_steps(folder)[-1] == step
  checkpoints.close()
print("orbax", ocp.__version__, "done")
"""


def oldest():
  """Returns the oldest orbax that requirements.txt allows."""
  (bound,) = re.findall(r"^orbax-checkpoint>=([\d.]+)", (ROOT / "requirements.txt").read_text(),
                        re.MULTILINE)
  return bound if bound.count(".") == 2 else f"{bound}.0"


@functools.cache
def installed(version, folder):
  """Puts a version of orbax into a folder, and returns it; skips where no index answers."""
  place = pathlib.Path(folder) / version
  result = subprocess.run(
      [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "install", "--no-deps",
       "--target", place, f"orbax-checkpoint=={version}" if version != "newest" else
       "orbax-checkpoint"],
      capture_output=True, text=True, check=False, timeout=300,
  )
  if result.returncode and re.search(r"connection|timed out|resolve|retries", result.stderr, re.I):
    pytest.skip(f"no package index can be reached: {result.stderr.strip()[-200:]}")
  assert result.returncode == 0, result.stderr
  return place


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  return tmp_path_factory.mktemp("versions")


@pytest.mark.parametrize("mode", ["rename", "commit file"])
def test_versions_read_each_others_checkpoints(tmp_path, place, mode):
  seen = {}

  def run(version, *actions):
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, tmp_path / "checkpoints", mode, *actions], cwd=ROOT,
        env=os.environ | {
            "PYTHONPATH": f"{installed(version, str(place))}{os.pathsep}{ROOT}",
            "JAX_PLATFORMS": "cpu", "XLA_FLAGS": FAST_TO_COMPILE,
        },
        capture_output=True, text=True, check=False, timeout=120,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    (seen[version],) = re.findall(r"orbax (\S+) done", result.stdout)

  run(oldest(), "save:1")
  run("newest", "restore:1", "save:2")
  run(oldest(), "restore:2", "save:3")
  run("newest", "restore:3")
  assert seen[oldest()] == oldest() != seen["newest"]
  commits = {file.parent.name for file in tmp_path.glob("checkpoints/*/commit_success.txt")}
  # By rename the newest orbax writes one as well.
  assert commits == ({"1", "2", "3"} if mode == "commit file" else {"2"})
  digests = json.loads((tmp_path / "checkpoints" / "1" / "digests" / "metadata").read_text())
  assert digests["arrays"].keys() == {
      "params/w", "params/b", "optimizer/step", "optimizer/optimizer/0/mu"}

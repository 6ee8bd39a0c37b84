"""Topologies, meshes and the compiler's refusals, tested without a compiler."""

import dataclasses

import jax
import pytest

from dense_jax.config import MeshConfig
from dense_jax.costs.chips import CHIPS, bound, estimate
from dense_jax.costs.hlo import Cost
from dense_jax.errors import InputError
from dense_jax.runs import compile as programs
from dense_jax.runs import compile_targets as targets
from tests.helpers import ROOT


@pytest.mark.parametrize(
    "topology",
    ["", "v5e", "v5:2x2", "h100:2x2", "h100:0", "v5e:2x2x2", "v5p:4x4", "v5e:0x2", "v5e:2x"],
)
def test_an_unknown_topology_names_those_that_are_known(topology):
  with pytest.raises(InputError, match=r"v4:2x2x1, .*, v6e:4x4, h100:8, h200:8") as error:
    targets.topology_devices(topology)
  assert f"--topology = {topology!r}" in str(error.value)


@pytest.mark.parametrize(
    ("given", "fitted"),
    [
        (MeshConfig(), MeshConfig()),
        (MeshConfig(data=2, fsdp=-1, tensor=2), MeshConfig(data=2, fsdp=-1, tensor=2)),
        (MeshConfig(data=2, fsdp=4), MeshConfig(data=2, fsdp=4)),
        (MeshConfig(data=3, fsdp=-1), MeshConfig(data=1, fsdp=-1)),
        (MeshConfig(data=1, fsdp=1), MeshConfig(data=1, fsdp=-1)),
    ],
)
def test_a_mesh_is_kept_where_it_divides_the_chips(given, fitted):
  assert targets.fit_mesh(given, 8) == fitted


def test_without_the_compiler_the_error_says_how_to_install_it(monkeypatch, tmp_path):
  monkeypatch.setattr(targets.importlib.util, "find_spec", lambda _: None)
  monkeypatch.setattr(targets.sys, "prefix", str(tmp_path))
  monkeypatch.setattr(targets.os, "environ", {})
  with pytest.raises(InputError, match=r"pip install -e '.\[tpu\]'.*make test"):
    targets.topology_devices("v5e:2x2")


def test_without_the_gpu_compiler_the_error_says_how_to_install_it(monkeypatch, tmp_path):
  monkeypatch.setattr(targets, "_has_cuda", lambda: False)
  monkeypatch.setenv(targets.GPU_COMPILER, str(tmp_path))
  with pytest.raises(InputError, match=rf"`make gpu-compiler` puts it into {tmp_path}"):
    targets.topology_devices("h100:8")
  assert targets.run_elsewhere("h100:8", "some.module", []) is None


@pytest.mark.parametrize("topology", ["v5e:2x2", "h100:8", "unknown"])
def test_commands_for_gpus_run_where_their_compiler_is(monkeypatch, tmp_path, topology):
  python = tmp_path / "bin" / "python"
  python.parent.mkdir()
  python.write_text(f'#!/bin/sh\necho "$PYTHONPATH $@" > {tmp_path}/call; exit 7\n')
  python.chmod(0o755)
  monkeypatch.setattr(targets, "_has_cuda", lambda: False)
  monkeypatch.setenv(targets.GPU_COMPILER, str(tmp_path))
  monkeypatch.setenv("PYTHONPATH", "other")
  status = targets.run_elsewhere(topology, "some.module", ["--topology", topology])
  if topology != "h100:8":
    assert status is None and not (tmp_path / "call").exists()
    return
  assert status == 7
  assert (tmp_path / "call").read_text() == f"{ROOT}:other -m some.module --topology h100:8\n"
  monkeypatch.setattr(targets, "_has_cuda", lambda: True)
  assert targets.run_elsewhere(topology, "some.module", []) is None


@pytest.mark.parametrize(
    ("message", "size"),
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
         "temporaries (416.00G) exceeds available HBM (15.75G).", 416 * 2**30),
        ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space "
         "hbm. Used 18.50G of 15.75G hbm. Exceeded hbm capacity by 2.75G.", 18.5 * 2**30),
    ],
)
def test_the_compilers_refusals_are_understood(message, size):
  assert programs._refused(jax.errors.JaxRuntimeError(message)) == size
  with pytest.raises(jax.errors.JaxRuntimeError):
    programs._refused(jax.errors.JaxRuntimeError(message.removeprefix("RESOURCE_EXHAUSTED: ")))


def test_bounds_are_of_the_published_peaks():
  cost = Cost(flops=3e14, matmul_flops=197e12, bytes_accessed=819e9 * 2)
  cost.counts["all-gather"], cost.sizes["all-gather"] = 3, 4 * 10**11
  found = bound(cost, CHIPS["v5e"])
  assert dataclasses.astuple(found) == (1, 2, 1)
  assert found.seconds == 2


def test_a_gpus_estimate_is_the_sum_at_measured_ceilings():
  cost = Cost(flops=3e14, matmul_flops=79e12, bytes_accessed=1.5e12)
  found = estimate(cost, CHIPS["h100"])
  assert dataclasses.astuple(found) == pytest.approx((0.1, 0.5))
  assert found.seconds == pytest.approx(0.6)
  assert estimate(cost, CHIPS["v5e"]) is None

"""Topologies, meshes and the compiler's refusals, tested without a compiler."""

import dataclasses

import jax
import pytest

from dense_jax.config import MeshConfig
from dense_jax.costs.chips import CHIPS, bound
from dense_jax.costs.hlo import Cost
from dense_jax.errors import InputError
from dense_jax.runs import compile as programs


@pytest.mark.parametrize(
    "topology", ["", "v5e", "v5:2x2", "h100:2x2", "v5e:2x2x2", "v5p:4x4", "v5e:0x2", "v5e:2x"]
)
def test_an_unknown_topology_names_those_that_are_known(topology):
  with pytest.raises(InputError, match=r"v4:2x2x1, v5e:4x4, v5p:2x2x1, v6e:4x4") as error:
    programs.topology_devices(topology)
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
  assert programs.fit_mesh(given, 8) == fitted


def test_without_the_compiler_the_error_says_how_to_install_it(monkeypatch, tmp_path):
  monkeypatch.setattr(programs.importlib.util, "find_spec", lambda _: None)
  monkeypatch.setattr(programs.sys, "prefix", str(tmp_path))
  monkeypatch.setattr(programs.os, "environ", {})
  with pytest.raises(InputError, match=r"pip install -e '.\[tpu\]'.*make test"):
    programs.topology_devices("v5e:2x2")


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

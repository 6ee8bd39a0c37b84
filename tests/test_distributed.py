"""How a process learns of the others; no other process is needed for that."""

import os

import jax
import numpy as np
import pytest

from dense_jax import distributed
from dense_jax.errors import InputError

PLACE = {
    "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "TPU_PROCESS_ADDRESSES",
    "TPU_WORKER_HOSTNAMES", "MEGASCALE_NUM_SLICES", "TPU_SKIP_MDS_QUERY",
}


@pytest.fixture
def joined(monkeypatch):
  """An environment of one process; the calls that would join others."""
  calls = []
  monkeypatch.setattr(
      jax.distributed, "initialize", lambda *args, **options: calls.append((args, options))
  )
  monkeypatch.setattr(distributed, "_metadata", lambda attribute: "")
  for name in PLACE:
    monkeypatch.delenv(name, raising=False)
  return calls


@pytest.mark.parametrize(("flags", "set_before", "expected"), [
    ("--xla_dump_to=x --xla_force_host_platform_device_count=4", None, "32"),
    ("--xla_force_host_platform_device_count=4", "5", "5"),
    ("--xla_dump_to=x", None, None),
    (None, None, None),
])
def test_simulated_devices_have_threads_for_several_collectives_each(
    flags, set_before, expected, monkeypatch
):
  for name, value in {"XLA_FLAGS": flags, "PJRT_NPROC": set_before}.items():
    monkeypatch.delenv(name, raising=False)
    if value is not None:
      monkeypatch.setenv(name, value)
  distributed.reserve_threads()
  assert os.environ.get("PJRT_NPROC") == expected
  os.environ.pop("PJRT_NPROC", None)


def test_one_process_stays_alone(joined):
  distributed.initialize()
  distributed.initialize("localhost:1234", 1, 0)
  assert not joined
  assert distributed.is_first() and distributed.name() == ""
  assert distributed.Agreement()(True) is True
  distributed.check_same({"anything": object()})
  np.testing.assert_array_equal(distributed.to_host(jax.numpy.arange(3)), np.arange(3))


def test_a_preemption_is_heard_of_in_a_job_of_several_processes(monkeypatch):
  service = distributed.multihost_utils
  monkeypatch.setattr(service, "reached_preemption_sync_point", lambda step: step == 3)
  assert not any(distributed.notified_of_preemption(step) for step in range(5))
  monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
  assert [step for step in range(5) if distributed.notified_of_preemption(step)] == [3]

  def disabled(step):
    raise RuntimeError("Preemption sync manager has not been initialized.")

  monkeypatch.setattr(service, "reached_preemption_sync_point", disabled)
  assert not distributed.notified_of_preemption(3)


def test_explicit_arguments_need_no_detection(joined):
  distributed.initialize("10.0.0.1:1234", 4, 3)
  ((args, options),) = joined
  assert args == ("10.0.0.1:1234", 4, 3)
  assert options["cluster_detection_method"] == "deactivate"


@pytest.mark.parametrize(("arguments", "message"), [
    (("localhost:1", None, None), "--processes and --process-id are missing"),
    ((None, 2, 1), "--coordinator is missing"),
    (("localhost:1", 2, None), "--process-id is missing"),
    (("localhost", 2, 0), "--coordinator = 'localhost' is not valid: expected HOST:PORT"),
    (("localhost:1", 0, 0), "--processes = 0 is not valid"),
    (("localhost:1", 2, 2), "--process-id = 2 is not valid: expected an integer from 0 to 1"),
    (("localhost:1", 2, -1), "--process-id = -1 is not valid"),
])
def test_bad_arguments_are_named(joined, arguments, message):
  with pytest.raises(InputError) as error:
    distributed.initialize(*arguments)
  assert message in str(error.value)
  assert not joined


@pytest.mark.parametrize(("environment", "platforms", "joins"), [
    ({"SLURM_STEP_NUM_TASKS": "4"}, "cpu", True),
    ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "4"}, "cpu", False),
    ({"OMPI_COMM_WORLD_SIZE": "2"}, "cpu", True),
    ({"TPU_WORKER_HOSTNAMES": "a,b"}, "tpu,cpu", True),
    ({"TPU_WORKER_HOSTNAMES": "a,b"}, "cpu", False),
    ({"TPU_WORKER_HOSTNAMES": "localhost"}, "tpu,cpu", False),
    ({"TPU_PROCESS_ADDRESSES": "a:1,b:1"}, "tpu", True),
    ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, "tpu,cpu", True),
    ({}, "tpu,cpu", False),
])
def test_the_environment_says_whether_there_are_others(
    joined, monkeypatch, environment, platforms, joins
):
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  monkeypatch.setattr(type(jax.config), "jax_platforms", platforms)
  distributed.initialize()
  assert bool(joined) == joins


@pytest.mark.parametrize(("endpoints", "tpu_env", "joins"), [
    ("host-0", "ACCELERATOR_TYPE: 'v5litepod-4'", False),
    ("x:0:10.0.0.1,x:1:10.0.0.2", "", True),
    ("host-0", "MEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '0'", True),
    ("", "", False),
])
def test_a_cloud_tpu_vm_asks_its_metadata(joined, monkeypatch, endpoints, tpu_env, joins):
  attributes = {"worker-network-endpoints": endpoints, "tpu-env": tpu_env}
  monkeypatch.setattr(distributed, "_metadata", attributes.__getitem__)
  assert (distributed._tpu_hosts() > 1) == joins


def test_what_jax_cannot_read_is_an_input_error(joined, monkeypatch):
  def refuse(**options):
    raise ValueError("coordinator_address should be defined.")

  monkeypatch.setattr(jax.distributed, "initialize", refuse)
  monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
  with pytest.raises(InputError, match="give each of them --coordinator, --processes"):
    distributed.initialize()

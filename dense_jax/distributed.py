"""Runs several processes as one program: joins them, and lets them agree, gather and end.

Each process has some of the devices, and all processes run the same steps. In a program of one
process, nothing here uses the network or waits.
"""

import contextlib
import os
import re
import sys
import threading
import urllib.request
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dense_jax.errors import InputError
from dense_jax.types import Array, PyTree

_METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"
_GOODBYE_SECONDS = 5.0
_MESSAGE_BYTES = 4096
# At the end the processes wait for each other, one of which may still be writing.
_SHUTDOWN_SECONDS = 3600
_THREADS_PER_DEVICE = 8


def reserve_threads() -> None:
  """Gives simulated devices of a CPU the threads that their collectives need.

  Must be called before anything asks jax for its devices. XLA's CPU client has one thread a
  device, unless this host has more cores. Devices may come to independent collectives in different
  orders: each then holds a thread while it waits for the others, none is left for those, and XLA
  ends the process after 40 s. PJRT_NPROC, if set, is kept.
  """
  flags = os.environ.get("XLA_FLAGS", "")
  count = re.search(r"--xla_force_host_platform_device_count=(\d+)", flags)
  if count:
    os.environ.setdefault("PJRT_NPROC", str(_THREADS_PER_DEVICE * int(count[1])))


def initialize(
    coordinator: str | None = None, processes: int | None = None, process_id: int | None = None
) -> None:
  """Joins the other processes, if there are any.

  Must be called before anything asks jax for its devices. Without arguments, the processes are
  found in the environment: a Slurm or Open MPI job with several tasks, or a TPU slice with
  several hosts (GKE or Cloud TPU VMs).

  Args:
    coordinator: HOST:PORT of process 0, an address that the others can reach.
    processes: the number of processes.
    process_id: this process's number, from 0.

  Raises:
    InputError: some of the arguments are missing or not valid, or the environment has several
      processes but jax cannot tell which one this is.
  """
  given = {"--coordinator": coordinator, "--processes": processes, "--process-id": process_id}
  missing = [name for name, value in given.items() if value is None]
  if coordinator is not None and processes is not None and process_id is not None:
    _check(coordinator, processes, process_id)
    if processes > 1:
      # jax gives up after five minutes, and does not say for whom it has been waiting.
      print(f"process {process_id} meets the other {processes - 1} at {coordinator}",
            file=sys.stderr, flush=True)
      jax.distributed.initialize(
          coordinator, processes, process_id, cluster_detection_method="deactivate",
          shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
      )
  elif len(missing) < len(given):
    raise InputError(
        f"{', '.join(given)} go together: {' and '.join(missing)} "
        f"{'is' if len(missing) == 1 else 'are'} missing"
    )
  elif _processes_of_environment() > 1:
    try:
      jax.distributed.initialize(shutdown_timeout_seconds=_SHUTDOWN_SECONDS)
    except ValueError as error:
      raise InputError(
          f"this is one of several processes, but jax cannot tell which ({error}): give each "
          f"of them {', '.join(given)}"
      ) from error
  if jax.process_count() > 1 and not jax.distributed.is_initialized():
    raise InputError(
        f"this is one of the {jax.process_count()} hosts of a TPU slice, but nothing in the "
        f"environment says so: give each of them {', '.join(given)}"
    )


def _check(coordinator: str, processes: int, process_id: int) -> None:
  if not re.fullmatch(r".+:\d{1,5}", coordinator):
    raise InputError(f"--coordinator = {coordinator!r} is not valid: expected HOST:PORT")
  if processes < 1:
    raise InputError(f"--processes = {processes} is not valid: expected an integer >= 1")
  if not 0 <= process_id < processes:
    raise InputError(
        f"--process-id = {process_id} is not valid: expected an integer from 0 to "
        f"{processes - 1}, as --processes is {processes}"
    )


def _processes_of_environment() -> int:
  """Returns the number of processes that the environment announces; 1 if it announces none."""
  # The step's tasks, not the job's: a shell inside a job of many tasks is one process.
  tasks = os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ.get("OMPI_COMM_WORLD_SIZE")
  if tasks:
    return int(tasks)
  # jax sets this itself on a machine with TPU chips and libtpu.
  platforms: str = jax.config.jax_platforms or ""  # type: ignore[attr-defined]
  return _tpu_hosts() if "tpu" in platforms else 1


def _tpu_hosts() -> int:
  """Returns the number of hosts of all slices, from GKE's environment or the VM's metadata."""
  hosts = os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES")
  slices = os.environ.get("MEGASCALE_NUM_SLICES")
  if hosts is None and "TPU_SKIP_MDS_QUERY" not in os.environ:
    hosts = _metadata("worker-network-endpoints")
    found = re.search(r"MEGASCALE_NUM_SLICES: *'?(\d+)", _metadata("tpu-env"))
    slices = slices or (found[1] if found else None)
  return len((hosts or "").split(",")) * int(slices or 1)


def _metadata(attribute: str) -> str:
  """Returns a metadata attribute of this virtual machine; "" if it cannot be read."""
  request = urllib.request.Request(_METADATA + attribute, headers={"Metadata-Flavor": "Google"})
  try:
    with urllib.request.urlopen(request, timeout=5) as response:
      return response.read().decode()
  except OSError:
    return ""


def name() -> str:
  """Returns a prefix for messages, such as `process 1 of 4: `; "" if there is one process."""
  if not jax.distributed.is_initialized():
    return ""
  return f"process {jax.process_index()} of {jax.process_count()}: "


def is_first() -> bool:
  """Returns whether this is process 0, the one that writes and prints."""
  return jax.process_index() == 0


@contextlib.contextmanager
def only_first_prints() -> Iterator[None]:
  """Discards the standard output of all processes but the first; standard error stays."""
  if is_first():
    yield
    return
  with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
    yield


def to_host(tree: PyTree) -> PyTree:
  """Gathers a tree's arrays to whole numpy arrays in every process; all processes must call it."""
  if jax.process_count() == 1:
    return jax.device_get(tree)
  return multihost_utils.process_allgather(tree, tiled=True)


def check_same(values: Mapping[str, object]) -> None:
  """Waits for all processes and checks that they have the same values.

  Args:
    values: field name -> a value whose `repr` is compared.

  Raises:
    InputError: a process has another value than process 0; raised in all processes.
  """
  if jax.process_count() == 1:
    return
  digests = np.asarray([zlib.crc32(repr(value).encode()) for value in values.values()], np.uint32)
  everywhere = multihost_utils.process_allgather(digests)
  for name, column in zip(values, everywhere.T, strict=True):
    others = np.flatnonzero(column != column[0])
    if others.size:
      raise InputError(
          f"{name} is not the same in all processes: that of process {others[0]} differs from "
          "that of process 0"
      )


def any_process(value: bool) -> bool:
  """Returns whether `value` is true in any process; all processes must call it."""
  if jax.process_count() == 1:
    return value
  return bool(np.any(multihost_utils.process_allgather(np.asarray(value))))


def notified_of_preemption(step: int) -> bool:
  """Returns whether the cluster has announced that it takes machines away, and this is the step.

  jax's preemption service passes one machine's notice on, and picks a step that all processes have
  yet to reach. All of them must call this once for each step, in order.
  """
  if not jax.distributed.is_initialized():
    return False
  try:
    return multihost_utils.reached_preemption_sync_point(step)
  except RuntimeError:  # The service is turned off (jax_enable_preemption_service).
    return False


def by_first(action: Callable[[], None]) -> None:
  """Runs `action` in the first process, while the others wait for it.

  Raises:
    InputError: `action` raised one; it is raised in all processes.
  """
  if jax.process_count() == 1:
    action()
    return
  message = b""
  if is_first():
    try:
      action()
    except InputError as error:
      message = str(error).encode(errors="replace")[:_MESSAGE_BYTES]
  told = multihost_utils.broadcast_one_to_all(
      np.frombuffer(message.ljust(_MESSAGE_BYTES, b"\0"), np.uint8)
  )
  message = bytes(np.asarray(told)).rstrip(b"\0")
  if message:
    raise InputError(message.decode(errors="replace"))


class Agreement:
  """Tells every process, at the same call, the highest number that any process has said.

  Each call is one all-reduce of a number, queued on the devices behind the step that was sent
  before it. To avoid waiting for the devices, a call returns the result of the call before; only
  the first waits for its own.
  """

  def __init__(self) -> None:
    self._before: Array | None = None
    if jax.process_count() > 1:
      mesh = Mesh(np.asarray(jax.devices()), ("device",))
      self._numbers = NamedSharding(mesh, PartitionSpec("device"))
      self._highest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))

  def __call__(self, number: int) -> int:
    """Contributes an int32 `number`, and returns the highest number of the call before.

    The first call, and every call of a single process, returns its own result.
    """
    if jax.process_count() == 1:
      return number
    own = np.asarray([number], np.int32)
    now = self._highest(
        jax.make_array_from_callback((jax.device_count(),), self._numbers, lambda _: own)
    )
    before, self._before = self._before, now
    return int(now if before is None else before)


def end(status: int) -> NoReturn:
  """Ends a process that stops before its work is done, and does not return.

  Tries an orderly shutdown with the other processes for 5 s, which succeeds if they are ending
  too. Then exits hard, so that processes that still wait for this one fail at once instead of
  after minutes.
  """
  if jax.distributed.is_initialized():
    goodbye = threading.Thread(target=jax.distributed.shutdown, daemon=True)
    goodbye.start()
    goodbye.join(_GOODBYE_SECONDS)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
  sys.exit(status)

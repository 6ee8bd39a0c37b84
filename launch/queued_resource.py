"""Controls a queued resource of Cloud TPU, and the workers of its slices, through gcloud."""

import dataclasses
import re
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from typing import TypeVar

from dense_jax.errors import InputError
from launch import commands, job, workers

SOURCE = job.ROOT
# The API's names of states; it has others in between. ABSENT means that there is no resource.
ACTIVE = "ACTIVE"
PREEMPTED = ("SUSPENDING", "SUSPENDED")
FAILED = "FAILED"
DELETING = "DELETING"
ABSENT = ""
# After so many failed looks in a row, give up: this machine's network may be down for a while.
_FAILED_LOOKS = 10
_Seen = TypeVar("_Seen")


@dataclasses.dataclass(frozen=True)
class Capacity:
  """The capacity that a queued resource asks for.

  Attributes:
    tpu_type: the type of each slice.
    spot: whether to use preemptible capacity.
    reserved: whether to use the capacity of a reservation.
    runtime: the software version of the virtual machines.
    service_account: the account that they act as; "" means the project's default.
  """

  tpu_type: job.TpuType
  spot: bool
  reserved: bool
  runtime: str
  service_account: str


class QueuedResource:
  """One queued resource.

  Its methods raise CommandError if gcloud fails, and InputError if it is not installed.
  """

  def __init__(
      self, runner: commands.Runner, name: str, project: str, zone: str, slices: int,
      poll_seconds: float,
  ) -> None:
    self.runner, self.name, self.slices = runner, name, slices
    self.place = [f"--project={project}", f"--zone={zone}"]
    self._poll_seconds = poll_seconds

  @property
  def nodes(self) -> list[str]:
    """The names of the slices."""
    if self.slices == 1:
      return [self.name]
    return [f"{self.name}-{index}" for index in range(self.slices)]

  def create(self, capacity: Capacity) -> None:
    """Requests the resource; it may take hours until it is active."""
    nodes = ([f"--node-id={self.name}"] if self.slices == 1
             else [f"--node-count={self.slices}", f"--node-prefix={self.name}"])
    self.runner.run([
        *self._resource("create"), f"--accelerator-type={capacity.tpu_type.name}",
        f"--runtime-version={capacity.runtime}", *nodes,
        *(["--spot"] if capacity.spot else []), *(["--reserved"] if capacity.reserved else []),
        *([f"--service-account={capacity.service_account}"] if capacity.service_account else []),
    ])

  def state(self, if_dry: str = ACTIVE) -> str:
    """Returns the resource's state by the API's name; `ABSENT` if there is no such resource."""
    command = [*self._resource("describe"), "--format=value(state.state)"]
    try:
      return self.runner.output(command, if_dry).strip()
    except commands.CommandError as error:
      if "NOT_FOUND" in error.stderr:
        return ABSENT
      raise

  def wait(self) -> str:
    """Waits until the resource is active, failed, preempted or absent; returns its state."""
    before = None
    while (state := self.persist(self.state)) not in (ACTIVE, ABSENT, FAILED, *PREEMPTED):
      if state != before:
        self.runner.say(f"{self.name} is {state}")
      before = state
      self.pause()
    self.runner.say(f"{self.name} is {state or 'not there'}")
    return state

  def reason(self) -> str:
    """Returns the API's description of the state, for messages."""
    described = self.runner.output([*self._resource("describe"), "--format=yaml(state)"], "")
    return " ".join(described.split())

  def delete(self) -> None:
    """Deletes the resource and its slices."""
    self.runner.run([*self._resource("delete"), "--force", "--quiet"])

  def sync(self) -> None:
    """Copies the project, without files that git ignores, to all workers, and installs it there."""
    with tempfile.TemporaryDirectory() as folder:
      archive = f"{folder}/{workers.ARCHIVE}"
      count = _pack(archive)
      self.runner.say(f"{count} files of {SOURCE} are in {archive}")
      for node in self.nodes:
        self.runner.run([
            *self._vm("scp"), archive, f"{node}:{workers.ARCHIVE}", "--worker=all",
        ])
    self._on_workers(workers.install())

  def start(self, work: job.Job) -> None:
    """Starts training on all workers that do not run it already."""
    self._on_workers(workers.start(work.command(workers.PYTHON), work.environment))

  def stop(self) -> None:
    """Waits until training has ended on all workers, and kills it if that takes too long."""
    self._on_workers(workers.stop())

  def statuses(self, if_dry: str = "0") -> list[str]:
    """Returns the state of training on each worker: an exit status, or a word of `workers`."""
    found = []
    for node in self.nodes:
      command = [*self._vm("ssh"), node, "--worker=all", f"--command={workers.status()}"]
      found += re.findall(r"^status=(\w+)$", self.runner.output(command, f"status={if_dry}"), re.M)
    if not found:
      raise commands.CommandError(f"no worker of {self.name} told its status")
    return found

  def logs(self, lines: int, *, worker: str, follow: bool) -> None:
    """Shows the log of one worker, or of all workers, of the first slice.

    Args:
      lines: how many past lines to show.
      worker: a worker's number, or "all".
      follow: whether to go on showing new lines.
    """
    command = workers.tail(lines, follow=follow)
    self.runner.run(
        [*self._vm("ssh"), self.nodes[0], f"--worker={worker}", f"--command={command}"]
    )

  def persist(self, look: Callable[[], _Seen]) -> _Seen:
    """Returns what `look` returns, which is called again after CommandError, ten times in all."""
    for _ in range(_FAILED_LOOKS - 1):
      try:
        return look()
      except commands.CommandError as error:
        self.runner.say(f"{error}; asking again")
        self.pause()
    return look()

  def pause(self) -> None:
    """Waits for the polling interval."""
    self.runner.sleep(self._poll_seconds)

  def _on_workers(self, command: str) -> None:
    for node in self.nodes:
      self.runner.run([*self._vm("ssh"), node, "--worker=all", f"--command={command}"])

  def _resource(self, verb: str) -> list[str]:
    return ["gcloud", "compute", "tpus", "queued-resources", verb, self.name, *self.place]

  def _vm(self, verb: str) -> list[str]:
    return ["gcloud", "compute", "tpus", "tpu-vm", verb, *self.place]


def _pack(archive: str) -> int:
  """Packs the project's tracked and addable files into an archive; returns their number."""
  listed = subprocess.run(
      ["git", "-C", str(SOURCE), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
      capture_output=True, text=True,
  )
  if listed.returncode:
    raise InputError(f"{SOURCE} is not a git checkout: {listed.stderr.strip()}")
  names = [name for name in listed.stdout.split("\0") if (SOURCE / name).is_file()]
  with tarfile.open(archive, "w:gz") as file:
    for name in names:
      file.add(SOURCE / name, name)
  return len(names)

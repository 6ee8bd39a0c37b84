"""A queued resource of Cloud TPU and the workers of its slices, by way of gcloud."""

import dataclasses
import re
import subprocess
import tarfile
import tempfile

from dense_jax.errors import InputError
from launch import commands, job, workers

SOURCE = job.ROOT
# States, as the API names them; it knows others on the way to them.
ACTIVE = "ACTIVE"
PREEMPTED = ("SUSPENDING", "SUSPENDED")
FAILED = "FAILED"
DELETING = "DELETING"
ABSENT = ""


@dataclasses.dataclass(frozen=True)
class Capacity:
  """What is asked for.

  Attributes:
    tpu_type: of each slice.
    spot: preemptible capacity.
    reserved: capacity of a reservation.
    runtime: the software of the virtual machines.
    service_account: what they act as; empty for the project's default.
  """

  tpu_type: job.TpuType
  spot: bool
  reserved: bool
  runtime: str
  service_account: str


class QueuedResource:
  """One queued resource.

  Its methods raise CommandError where gcloud fails, and InputError where it is not installed.
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
    """The slices' names."""
    if self.slices == 1:
      return [self.name]
    return [f"{self.name}-{index}" for index in range(self.slices)]

  def create(self, capacity: Capacity) -> None:
    """Asks for it; it may wait for hours before it is active."""
    nodes = ([f"--node-id={self.name}"] if self.slices == 1
             else [f"--node-count={self.slices}", f"--node-prefix={self.name}"])
    self.runner.run([
        *self._resource("create"), f"--accelerator-type={capacity.tpu_type.name}",
        f"--runtime-version={capacity.runtime}", *nodes,
        *(["--spot"] if capacity.spot else []), *(["--reserved"] if capacity.reserved else []),
        *([f"--service-account={capacity.service_account}"] if capacity.service_account else []),
    ])

  def state(self, if_dry: str = ACTIVE) -> str:
    """Its state, as the API names it; empty where there is no such resource."""
    command = [*self._resource("describe"), "--format=value(state.state)"]
    try:
      return self.runner.output(command, if_dry).strip()
    except commands.CommandError as error:
      if "NOT_FOUND" in error.stderr:
        return ABSENT
      raise

  def wait(self) -> str:
    """Waits until it is active, or will not be; returns its state."""
    before = None
    while (state := self.state()) not in (ACTIVE, ABSENT, FAILED, *PREEMPTED):
      if state != before:
        self.runner.say(f"{self.name} is {state}")
      before = state
      self.pause()
    self.runner.say(f"{self.name} is {state or 'not there'}")
    return state

  def reason(self) -> str:
    """What the API says of the state, for messages."""
    described = self.runner.output([*self._resource("describe"), "--format=yaml(state)"], "")
    return " ".join(described.split())

  def delete(self) -> None:
    """Deletes it and its slices."""
    self.runner.run([*self._resource("delete"), "--force", "--quiet"])

  def sync(self) -> None:
    """Puts this folder's files on all workers, without what git ignores, and installs them."""
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
    """Starts training on all workers, except where it is running."""
    self._on_workers(workers.start(work.command(workers.PYTHON), work.environment))

  def stop(self) -> None:
    """Sees to it that training has ended on all workers."""
    self._on_workers(workers.stop())

  def statuses(self, if_dry: str = "0") -> list[str]:
    """How training is on each worker: an exit status, or a word of `workers`."""
    found = []
    for node in self.nodes:
      command = [*self._vm("ssh"), node, "--worker=all", f"--command={workers.status()}"]
      found += re.findall(r"^status=(\w+)$", self.runner.output(command, f"status={if_dry}"), re.M)
    if not found:
      raise commands.CommandError(f"no worker of {self.name} told its status")
    return found

  def logs(self, lines: int, *, worker: str, follow: bool) -> None:
    """Shows the log of some workers of the first slice."""
    command = workers.tail(lines, follow=follow)
    self.runner.run(
        [*self._vm("ssh"), self.nodes[0], f"--worker={worker}", f"--command={command}"]
    )

  def pause(self) -> None:
    """Waits for as long as it takes to be worth asking again."""
    self.runner.sleep(self._poll_seconds)

  def _on_workers(self, command: str) -> None:
    for node in self.nodes:
      self.runner.run([*self._vm("ssh"), node, "--worker=all", f"--command={command}"])

  def _resource(self, verb: str) -> list[str]:
    return ["gcloud", "compute", "tpus", "queued-resources", verb, self.name, *self.place]

  def _vm(self, verb: str) -> list[str]:
    return ["gcloud", "compute", "tpus", "tpu-vm", verb, *self.place]


def _pack(archive: str) -> int:
  """Packs the files that git knows or would add; returns their number."""
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

"""Trains on Cloud TPU VMs: requests a queued resource, copies the code to it, trains, cleans up.

    python -m launch.tpu_vm train --name retnet --project my-project --zone us-east5-b \
        --tpu-type v6e-16 --spot --config experiments/dense_retnet_1p3b.py \
        --workdir gs://my-bucket/retnet --config.mesh.data=1 --config.mesh.fsdp=-1 --dry-run

`train` does everything, and watches until training has ended. After a preemption it requests the
resource again, after a failure it restarts training, and in the end it deletes the resource. If
`train` itself is interrupted, training continues; run the same command again to resume watching.
The other subcommands are the single steps of `train`.
"""

import argparse
import enum
import re
import shlex
import sys
from collections.abc import Sequence

from dense_jax.cli import common
from dense_jax.config import invalid
from dense_jax.errors import InputError
from launch import commands, job, workers
from launch.queued_resource import (
    ABSENT,
    ACTIVE,
    DELETING,
    FAILED,
    PREEMPTED,
    Capacity,
    QueuedResource,
)

# The software version of a TPU VM, by generation of the chips.
_RUNTIMES = {"v4": "tpu-ubuntu2204-base", "v5e": "v2-alpha-tpuv5-lite", "v5p": "v2-alpha-tpuv5",
             "v6e": "v2-alpha-tpuv6e"}
_LOG_LINES = 40


class _Outcome(enum.Enum):
  FINISHED = "all steps are done"
  BAD_INPUT = "the input is not valid"
  DIVERGED = "the run stopped, as its numbers go wrong again and again"
  FAILED = "training failed"
  PREEMPTED = "the resource was preempted"
  DELETED = "the resource was deleted"


# Statuses of a worker that another start would end with again.
_FINAL = {2: _Outcome.BAD_INPUT, common.DIVERGED: _Outcome.DIVERGED}

def _gone(state: str) -> _Outcome:
  """Returns the outcome of a resource that is gone; one that was deleted is not requested again."""
  return _Outcome.DELETED if state in (ABSENT, DELETING) else _Outcome.PREEMPTED


def _parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[tuple[str, str]]]:
  parser = argparse.ArgumentParser(
      prog="python -m launch.tpu_vm", description=__doc__, allow_abbrev=False,
      formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  subcommands = parser.add_subparsers(dest="subcommand", required=True, metavar="SUBCOMMAND")

  def add(name: str, does: str) -> argparse.ArgumentParser:
    added = subcommands.add_parser(name, help=does, description=does, allow_abbrev=False)
    added.add_argument("--name", required=True, help="the queued resource's")
    commands.add_place_arguments(added)
    job.add_slices_argument(added)
    added.add_argument("--poll-seconds", type=float, default=30, metavar="N",
                       help="between two looks at its state (default 30)")
    return added

  train = add("train", "creates, syncs, runs, watches, restarts, and deletes in the end")
  create = add("create", "asks for the resource, and waits for it")
  add("wait", "waits until the resource is active")
  add("sync", "puts this folder's files on all workers, and installs them")
  run = add("run", "starts training on all workers, where it goes on by itself")
  add("status", "says how the resource and the workers are")
  logs = add("logs", "shows the log, and goes on showing it")
  add("delete", "deletes the resource: it costs money until then")
  for one in (train, create):
    capacity = one.add_mutually_exclusive_group()
    capacity.add_argument("--spot", action="store_true", help="preemptible capacity")
    capacity.add_argument("--reserved", action="store_true", help="capacity of a reservation")
    one.add_argument("--runtime-version", metavar="NAME",
                     help="the workers' software (default: what the TPU type needs)")
    one.add_argument("--service-account", default="", metavar="EMAIL",
                     help="what workers act as; it must reach the bucket")
  for one in (train, create, run):
    job.add_tpu_type_argument(one)
  for one in (train, run):
    job.add_job_arguments(one)
  train.add_argument("--max-restarts", type=int, default=10, metavar="N",
                     help="after a failure or a preemption (default 10)")
  train.add_argument("--keep", action="store_true", help="do not delete the resource in the end")
  logs.add_argument("--worker", default="0", help="of the first slice: a number, or all")
  logs.add_argument("--lines", type=int, default=_LOG_LINES, metavar="N",
                    help=f"of the past (default {_LOG_LINES})")
  return common.split_overrides(parser, arguments)


def _capacity(options: argparse.Namespace) -> Capacity:
  tpu_type = job.parse_tpu_type(options.tpu_type)
  runtime = options.runtime_version or _RUNTIMES[tpu_type.generation]
  return Capacity(tpu_type, options.spot, options.reserved, runtime, options.service_account)


def _wait(resource: QueuedResource, *others: str) -> str:
  """Waits until the resource is active or in one of the states `others`; returns the state.

  Raises:
    CommandError: the resource does not exist, or ended up in another state.
  """
  state = resource.wait()
  if state not in (ACTIVE, *others):
    reason = resource.reason() if state else "there is no such resource"
    raise commands.CommandError(f"{resource.name} will not be active: {reason}")
  return state


def _activate(resource: QueuedResource, capacity: Capacity) -> str:
  """Requests the resource unless there is a usable one, and waits for it; returns its state."""
  state = resource.state(if_dry=ABSENT)
  if state == DELETING:
    state = resource.wait()
  if state in (FAILED, *PREEMPTED):
    resource.delete()
    state = ABSENT
  if state == ABSENT:
    resource.create(capacity)
  return _wait(resource, *PREEMPTED)


def _watch(resource: QueuedResource, work: job.Job) -> _Outcome:
  """Starts training unless it is running, and waits until it has ended; returns how it ended."""
  statuses = resource.persist(lambda: resource.statuses(if_dry=workers.ABSENT))
  if any(status != workers.RUNNING for status in statuses):
    if workers.RUNNING in statuses:
      resource.stop()
    resource.sync()
    resource.start(work)
  else:
    resource.runner.say("training is running already, as it was started: watching it")
  resource.runner.say("log: " + _subcommand("logs", resource))

  def look() -> tuple[str, list[str]]:
    state = resource.state()
    return state, resource.statuses() if state == ACTIVE else []

  while True:
    resource.pause()
    state, statuses = resource.persist(look)
    if state != ACTIVE:
      return _gone(state)
    for status, outcome in _FINAL.items():
      if str(status) in statuses:
        return outcome
    if all(status == "0" for status in statuses):
      return _Outcome.FINISHED
    if any(status not in (workers.RUNNING, "0") for status in statuses):
      resource.stop()
      return _Outcome.FAILED


def _train(
    resource: QueuedResource, capacity: Capacity, work: job.Job, max_restarts: int, keep: bool
) -> int:
  """Runs the subcommand `train`; returns 0 if all steps are done, a status of `_FINAL`, or 1."""
  for restarts in range(max_restarts + 1):
    if restarts:
      resource.runner.say(f"restart {restarts} of at most {max_restarts}")
    outcome = _Outcome.PREEMPTED
    if _activate(resource, capacity) == ACTIVE:
      try:
        outcome = _watch(resource, work)
      except commands.CommandError:
        # A command also fails if the resource went away under it.
        if (state := resource.state()) == ACTIVE:
          raise
        outcome = _gone(state)
    resource.runner.say(outcome.value)
    if outcome not in (_Outcome.FAILED, _Outcome.PREEMPTED):
      break
  if outcome in (*_FINAL.values(), _Outcome.FAILED):
    resource.logs(_LOG_LINES, worker="0", follow=False)
  if not keep and outcome != _Outcome.DELETED:
    resource.delete()
  statuses = {outcome: status for status, outcome in _FINAL.items()}
  return statuses.get(outcome, 0 if outcome == _Outcome.FINISHED else 1)


def _subcommand(name: str, resource: QueuedResource) -> str:
  return shlex.join([
      "python", "-m", "launch.tpu_vm", name, f"--name={resource.name}", *resource.place,
      f"--slices={resource.slices}",
  ])


def main(arguments: Sequence[str]) -> int:
  """Runs a subcommand; returns the exit status.

  Returns:
    0; but from `train`, 2 if training ended because of bad input, and 1 if it failed.

  Raises:
    InputError: an argument is not valid; raised before anything is done.
    CommandError: gcloud failed.
  """
  options, overrides = _parse(arguments)
  commands.check_name("--name", options.name)
  commands.check_place(options)
  slices = job.check_slices(options.slices)
  if overrides and options.subcommand not in ("train", "run"):
    raise InputError(f"{options.subcommand} takes no configuration: --config.{overrides[0][0]}")
  if options.poll_seconds < 0:
    raise invalid("--poll-seconds", options.poll_seconds, "a number >= 0")
  runner = commands.Runner(dry_run=options.dry_run)
  resource = QueuedResource(
      runner, options.name, options.project, options.zone, slices, options.poll_seconds
  )
  if options.subcommand == "train":
    if options.max_restarts < 0:
      raise invalid("--max-restarts", options.max_restarts, "an integer >= 0")
    work, capacity = job.parse_job(options, overrides), _capacity(options)
    if work.compile_command():
      runner.say(f"does it fit? {work.compile_command()}")
    try:
      return _train(resource, capacity, work, options.max_restarts, options.keep)
    except (commands.CommandError, KeyboardInterrupt):
      print(f"{options.name} may still be there, train and cost money. The same command goes on "
            f"watching it; {_subcommand('delete', resource)} deletes it.", file=sys.stderr)
      raise
  if options.subcommand == "run":
    resource.start(job.parse_job(options, overrides))
    runner.say("log: " + _subcommand("logs", resource))
  elif options.subcommand == "create":
    resource.create(_capacity(options))
    _wait(resource)
  elif options.subcommand == "wait":
    _wait(resource)
  elif options.subcommand == "sync":
    resource.sync()
  elif options.subcommand == "status":
    state = resource.state()
    runner.say(f"{options.name} is {state or 'not there'}")
    if state == ACTIVE:
      runner.say(f"training on its workers: {', '.join(resource.statuses())}")
  elif options.subcommand == "logs":
    if not re.fullmatch(r"all|\d+", options.worker):
      raise invalid("--worker", options.worker, "a worker's number, or all")
    resource.logs(options.lines, worker=options.worker, follow=True)
  else:
    resource.delete()
  return 0


if __name__ == "__main__":
  commands.run(main)

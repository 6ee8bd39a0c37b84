"""Trains on TPU slices of a GKE cluster: submits an experiment as a workload of xpk.

    python -m launch.xpk --name retnet --cluster my-cluster --project my-project \
        --zone us-east5-b --tpu-type v6e-16 --image my-registry/my-project/dense_jax:1 \
        --config experiments/dense_retnet_1p3b.py --workdir gs://my-bucket/retnet \
        --config.mesh.data=1 --config.mesh.fsdp=-1 --dry-run

xpk (https://github.com/AI-Hypercomputer/xpk) writes the JobSet. This launcher sets the options
that training needs: workers that fail or are preempted are restarted and resume from the newest
checkpoint, bad input (status 2) and numbers that go wrong (status 3) end the job, and a worker that
is evicted has time to save.
"""

import argparse
import pathlib
import re
import shlex
import shutil
import sys
from collections.abc import Sequence

from dense_jax.cli import common
from dense_jax.config import invalid
from dense_jax.errors import InputError
from launch import commands, job

# By default xpk restarts after status 42 and after 127-255, which covers all signals. Status 1
# means that training failed or was interrupted. Statuses 2 and 3, bad input and a run whose numbers
# go wrong, would come again.
_RESTART_ON = "1"


def _parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[tuple[str, str]]]:
  parser = argparse.ArgumentParser(
      prog="python -m launch.xpk", description=__doc__, allow_abbrev=False,
      formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--name", required=True, help="the workload's; a name is one run")
  parser.add_argument("--cluster", required=True, help="the GKE cluster, made by xpk")
  commands.add_place_arguments(parser)
  job.add_tpu_type_argument(parser)
  job.add_slices_argument(parser)
  image = parser.add_mutually_exclusive_group(required=True)
  image.add_argument("--image", help="a container image of launch/Dockerfile, in a registry")
  image.add_argument("--base-image", help="the same, on which xpk lays this folder's files first")
  capacity = parser.add_mutually_exclusive_group()
  capacity.add_argument("--spot", action="store_true", help="preemptible capacity")
  capacity.add_argument("--reservation", help="reserved capacity, by its name")
  capacity.add_argument("--on-demand", action="store_true", help="on-demand capacity")
  parser.add_argument("--max-restarts", type=int, default=10, metavar="N",
                      help="of all workers, after a failure or a preemption (default 10)")
  parser.add_argument("--grace-seconds", type=int, default=300, metavar="N",
                      help="from SIGTERM to SIGKILL, to save in (default 300)")
  parser.add_argument("--manifest", metavar="FILE",
                      help="keep the JobSet's manifest; with --dry-run to apply it yourself")
  job.add_job_arguments(parser)
  return common.split_overrides(parser, arguments)


def _check(options: argparse.Namespace) -> None:
  """Raises InputError for values that xpk would pass on, unchecked, to a shell or to Kubernetes."""
  commands.check_name("--name", options.name)
  commands.check_name("--cluster", options.cluster)
  commands.check_place(options)
  for field in ("image", "base_image", "reservation"):
    value = getattr(options, field)
    if value and not re.fullmatch(r"[A-Za-z0-9][\w./:@-]*", value):
      raise invalid(f"--{field.replace('_', '-')}", value, "a name without spaces or quotes")
  for field, lowest in (("max_restarts", 0), ("grace_seconds", 1)):
    value = getattr(options, field)
    if value < lowest:
      raise invalid(f"--{field.replace('_', '-')}", value, f"an integer >= {lowest}")
  if options.manifest and not pathlib.Path(options.manifest).absolute().parent.is_dir():
    raise invalid("--manifest", options.manifest, "a file in a folder that exists")


def find_xpk() -> str:
  """Finds the xpk program: the one on PATH, or the one that `make xpk` installs.

  Raises:
    InputError: xpk is not installed.
  """
  beside = pathlib.Path(sys.prefix) / "xpk" / "bin" / "xpk"
  found = shutil.which("xpk") or (str(beside) if beside.is_file() else None)
  if not found:
    raise InputError(
        "xpk is not installed: `make xpk` puts it into an environment of its own, beside this "
        "one, as it pins versions of many packages; any other xpk on PATH is used too"
    )
  return found


def workload_command(options: argparse.Namespace, work: job.Job) -> list[str]:
  """Returns the arguments of xpk that create the workload, without --dry-run."""
  # `exec` replaces the shell that xpk puts around a command, so that SIGTERM reaches the command.
  command = ["workload", "create", f"--workload={options.name}", f"--cluster={options.cluster}",
             f"--project={options.project}", f"--zone={options.zone}",
             f"--tpu-type={work.tpu_type.name}", f"--num-slices={work.slices}",
             f"--command=exec {work.command('python')}",
             f"--restart-on-exit-codes={_RESTART_ON}", f"--max-restarts={options.max_restarts}",
             f"--termination-grace-period-seconds={options.grace_seconds}"]
  if options.image:
    command.append(f"--docker-image={options.image}")
  else:
    command += [f"--base-docker-image={options.base_image}", f"--script-dir={job.ROOT}"]
  if options.spot:
    command.append("--spot")
  if options.on_demand:
    command.append("--on-demand")
  if options.reservation:
    command.append(f"--reservation={options.reservation}")
  command += [f"--env={name}={value}" for name, value in work.environment.items()]
  if options.manifest:
    command.append(f"--output-manifest-file={options.manifest}")
  return command


def main(arguments: Sequence[str]) -> int:
  """Submits the workload, or with --dry-run shows all that would be done; returns 0.

  Raises:
    InputError: an argument is not valid, or xpk is not installed; raised before the submission.
    CommandError: xpk failed.
  """
  options, overrides = _parse(arguments)
  _check(options)
  work = job.parse_job(options, overrides)
  runner = commands.Runner(dry_run=options.dry_run)
  if work.compile_command():
    runner.say(f"does it fit? {work.compile_command()}")
  command = ["xpk", *workload_command(options, work)]
  runner.show(command)
  # xpk has a dry run of its own, which prints the manifest and the commands that it would run.
  commands.execute([find_xpk(), *command[1:], *(["--dry-run"] if options.dry_run else [])])
  place = [f"--cluster={options.cluster}", f"--project={options.project}", f"--zone={options.zone}"]
  selector = (f"jobset.sigs.k8s.io/jobset-name={options.name},"
              "batch.kubernetes.io/job-completion-index=0")
  for what, next_command in {
      "state": ["xpk", "workload", "list", *place],
      "logs": ["kubectl", "logs", "--follow", "--prefix", f"--selector={selector}"],
      "stop": ["xpk", "workload", "delete", f"--workload={options.name}", *place],
  }.items():
    runner.say(f"{what}: {shlex.join(next_command)}")
  return 0


if __name__ == "__main__":
  commands.run(main)

"""Shell commands for the workers of a TPU VM, for use with `gcloud compute tpus tpu-vm ssh`.

A worker's home directory contains three folders: the project's files; the Python environment,
which is separate so that new files do not require a new installation; and the job's folder, with
its log, its process group's id and, once it has ended, its exit status.
"""

import shlex

ARCHIVE = "dense_jax.tar.gz"
_SOURCE = "~/dense_jax"
_VENV = "~/dense_jax_venv"
_JOB = "~/dense_jax_job"
# Required by jax; the workers' own Python is older.
_PYTHON_VERSION = "3.12"
PYTHON = f"{_VENV}/bin/python"
LOG = f"{_JOB}/log"

# The words that `status` may print in place of an exit status.
RUNNING = "running"
KILLED = "killed"
ABSENT = "absent"

_ALIVE = f'kill -0 -- "-$(cat {_JOB}/pid 2>/dev/null)" 2>/dev/null'
# A worker whose peer has failed notices within two minutes, and ends by itself.
_END_SECONDS = 150


def install() -> str:
  """Returns a command that unpacks the archive in the home directory and installs the project."""
  return " && ".join([
      f"rm -rf {_SOURCE}",
      f"mkdir -p {_SOURCE}",
      f"tar -xzf ~/{ARCHIVE} -C {_SOURCE}",
      "python3 -m pip install --quiet --user uv",
      f"~/.local/bin/uv venv --quiet --allow-existing --python {_PYTHON_VERSION} {_VENV}",
      f'~/.local/bin/uv pip install --quiet --python {PYTHON} --editable '
      '"$HOME/dense_jax[tpu,gcs]"',
  ])


def start(command: str, environment: dict[str, str]) -> str:
  """Returns a command that starts a job in the background, unless one is running already.

  The job keeps running when the connection ends. It leads its own process group, and its output
  is appended to the log.

  Args:
    command: the job's command line, for a shell in the project's folder.
    environment: variables to set for it.
  """
  settings = [shlex.quote(f"{name}={value}") for name, value in environment.items()]
  line = f"cd {_SOURCE} && exec {' '.join(['env', *settings, command])}"
  # A shell outside the process group outlives it, and records its exit status.
  script = (f"setsid bash -c {shlex.quote(line)} & echo $! > {_JOB}/pid; "
            f"wait $!; echo $? > {_JOB}/status")
  return (
      f"mkdir -p {_JOB}; "
      f"if {_ALIVE}; then echo it is running already; "
      f"else rm -f {_JOB}/pid {_JOB}/status; "
      f"nohup bash -c {shlex.quote(script)} >> {LOG} 2>&1 < /dev/null & "
      f"until [ -s {_JOB}/pid ]; do sleep 0.1; done; fi"
  )


def stop() -> str:
  """Returns a command that waits up to 150 s for the job to end by itself, and then kills it."""
  return (
      f"for second in $(seq {_END_SECONDS}); do {_ALIVE} || break; sleep 1; done; "
      f"if {_ALIVE}; then kill -KILL -- -$(cat {_JOB}/pid); fi"
  )


def status() -> str:
  """Returns a command that prints `status=` and the exit status, or one of the words above."""
  return (
      f"if {_ALIVE}; then echo status={RUNNING}; exit; fi; "
      # If it has ended just now, its status is about to be written.
      f"if [ -f {_JOB}/pid ] && [ ! -f {_JOB}/status ]; then sleep 1; fi; "
      f"if [ -f {_JOB}/status ]; then echo status=$(cat {_JOB}/status); "
      f"elif [ -f {_JOB}/pid ]; then echo status={KILLED}; "
      f"else echo status={ABSENT}; fi"
  )


def tail(lines: int, *, follow: bool) -> str:
  """Returns a command that prints the last lines of the log, and with `follow` all new ones."""
  return f"tail -n {lines} {'-F ' if follow else ''}{LOG}"

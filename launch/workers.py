"""Shell commands for the workers of a TPU VM, for use with `gcloud compute tpus tpu-vm ssh`.

A worker's home directory contains three folders: the project's files; the Python environment,
which is separate so that new files do not require a new installation; and the job's folder, with
its log, the id of its leader, which is that of its process group, and, once nothing of the group is
left, the leader's exit status.
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

# All that training may need: which of them a run uses is not known when a worker is installed.
EXTRAS = "tpu,gcs,hf,wandb"

_OVER = f"[ -s {_JOB}/status ]"
# The leader alone: processes that it started, such as those that read data, may outlive it.
_LEADER = f"leader=$(cat {_JOB}/pid 2>/dev/null)"
_ALIVE = f'{{ ! {_OVER} && {_LEADER} && kill -0 "$leader" 2>/dev/null; }}'
# A worker whose peer has failed notices within two minutes, and ends by itself.
_END_SECONDS = 150
# Processes with much memory take seconds to disappear after SIGKILL.
_KILL_SECONDS = 10


def install() -> str:
  """Returns a command that unpacks the archive in the home directory and installs the project."""
  return " && ".join([
      f"rm -rf {_SOURCE}",
      f"mkdir -p {_SOURCE}",
      f"tar -xzf ~/{ARCHIVE} -C {_SOURCE}",
      "python3 -m pip install --quiet --user uv",
      f"~/.local/bin/uv venv --quiet --allow-existing --python {_PYTHON_VERSION} {_VENV}",
      f'~/.local/bin/uv pip install --quiet --python {PYTHON} --editable '
      f'"$HOME/dense_jax[{EXTRAS}]"',
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
  script = (f"setsid bash -c {shlex.quote(line)} & leader=$!; echo $leader > {_JOB}/pid; "
            f"wait $leader; status=$?; {_kill_group()}; "
            # Unless it has been started again meanwhile.
            f'if [ "$(cat {_JOB}/pid)" = $leader ]; then echo $status > {_JOB}/status; fi')
  return (
      f"mkdir -p {_JOB}; "
      f"if {_ALIVE}; then echo it is running already; "
      # That shell may have been killed too.
      f"else {_kill_rest()}; rm -f {_JOB}/pid {_JOB}/status; "
      f"nohup bash -c {shlex.quote(script)} >> {LOG} 2>&1 < /dev/null & "
      f"until [ -s {_JOB}/pid ]; do sleep 0.1; done; fi"
  )


def stop() -> str:
  """Returns a command that waits up to 150 s for the job to end by itself, and then kills it."""
  return (
      f"for second in $(seq {_END_SECONDS}); do {_ALIVE} || break; sleep 1; done; "
      + _kill_rest()
  )


def _kill_rest() -> str:
  """Returns a command that kills what is left of a job that has written no status."""
  return f"if ! {_OVER} && {_LEADER}; then {_kill_group()}; fi"


def _kill_group() -> str:
  """Returns a command that kills the process group of `$leader`, and waits until it is gone."""
  return (
      f"for moment in $(seq {10 * _KILL_SECONDS}); do "
      'kill -KILL -- "-$leader" 2>/dev/null || break; sleep 0.1; done'
  )


def status() -> str:
  """Returns a command that prints `status=` and the exit status, or one of the words above."""
  return (
      f"if {_ALIVE}; then echo status={RUNNING}; exit; fi; "
      # If it has ended just now, its status is written once its process group is gone.
      f"for second in $(seq {_KILL_SECONDS + 1}); do "
      f"if {_OVER} || [ ! -f {_JOB}/pid ]; then break; fi; sleep 1; done; "
      f"if {_OVER}; then echo status=$(cat {_JOB}/status); "
      f"elif [ -f {_JOB}/pid ]; then echo status={KILLED}; "
      f"else echo status={ABSENT}; fi"
  )


def tail(lines: int, *, follow: bool) -> str:
  """Returns a command that prints the last lines of the log, and with `follow` all new ones."""
  return f"tail -n {lines} {'-F ' if follow else ''}{LOG}"

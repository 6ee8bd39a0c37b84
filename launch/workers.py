"""What the workers of a TPU VM do: shell commands for `gcloud compute tpus tpu-vm ssh`.

In a worker's home there are the project's files, an environment beside them, so that new files
do not install it again, and the job's folder: its log, the number of its process group, and its
exit status once it has ended.
"""

import shlex

ARCHIVE = "dense_jax.tar.gz"
_SOURCE = "~/dense_jax"
_VENV = "~/dense_jax_venv"
_JOB = "~/dense_jax_job"
# As jax needs; the workers' own Python is older.
_PYTHON_VERSION = "3.12"
PYTHON = f"{_VENV}/bin/python"
LOG = f"{_JOB}/log"

# What `status` may say beside an exit status.
RUNNING = "running"
KILLED = "killed"
ABSENT = "absent"

_ALIVE = f'kill -0 -- "-$(cat {_JOB}/pid 2>/dev/null)" 2>/dev/null'
# A worker whose peer has failed finds out within two minutes, and ends by itself.
_END_SECONDS = 150


def install() -> str:
  """Unpacks the archive in the worker's home, and installs what it needs."""
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
  """Starts a command line, which goes on when the connection ends; not where one is running.

  It leads a process group of its own. Its output is appended to the log.
  """
  settings = [shlex.quote(f"{name}={value}") for name, value in environment.items()]
  line = f"cd {_SOURCE} && exec {' '.join(['env', *settings, command])}"
  # A shell outside the group outlives it, and writes down how it ended.
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
  """Waits until the job has ended by itself, and kills it if it has not."""
  return (
      f"for second in $(seq {_END_SECONDS}); do {_ALIVE} || break; sleep 1; done; "
      f"if {_ALIVE}; then kill -KILL -- -$(cat {_JOB}/pid); fi"
  )


def status() -> str:
  """Prints one line, `status=` and the exit status or one of the words above."""
  return (
      f"if {_ALIVE}; then echo status={RUNNING}; exit; fi; "
      # One that has ended just now: its status comes at once.
      f"if [ -f {_JOB}/pid ] && [ ! -f {_JOB}/status ]; then sleep 1; fi; "
      f"if [ -f {_JOB}/status ]; then echo status=$(cat {_JOB}/status); "
      f"elif [ -f {_JOB}/pid ]; then echo status={KILLED}; "
      f"else echo status={ABSENT}; fi"
  )


def tail(lines: int, *, follow: bool) -> str:
  """Prints the log's last lines, and with `follow` those that come."""
  return f"tail -n {lines} {'-F ' if follow else ''}{LOG}"

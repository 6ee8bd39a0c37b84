"""The image's recipe, as far as it can be checked without building it."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib

import pytest

from launch import workers
from tests.helpers import ROOT

DOCKERFILE = (ROOT / "launch" / "Dockerfile").read_text()
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


@pytest.mark.parametrize("extra", ["tpu", "gpu"])
def test_the_extra_is_read_from_pyproject(extra, tmp_path):
  (command,) = re.findall(r"^RUN python (-c .* > extras.txt)", DOCKERFILE, re.M)
  shutil.copy(ROOT / "pyproject.toml", tmp_path)
  environment = os.environ | {"EXTRA": extra}
  subprocess.run(
      ["sh", "-c", f"{shlex.quote(sys.executable)} {command}"],
      cwd=tmp_path, env=environment, check=True,
  )
  installed = (tmp_path / "extras.txt").read_text().splitlines()
  tpu, *others = workers.EXTRAS.split(",")
  assert tpu == "tpu"
  assert installed == [each for name in (extra, *others) for each in EXTRAS[name]]


def test_tpu_is_the_default_and_the_python_is_supported():
  assert re.search(r"^ARG EXTRA=tpu$", DOCKERFILE, re.M)
  version = re.search(r"^FROM python:(\d+)\.(\d+)-slim$", DOCKERFILE, re.M)
  assert tuple(map(int, version.groups())) >= (3, 11)


def test_commands_find_the_project():
  """xpk copies this folder's files to /app, but starts commands in the image's WORKDIR."""
  assert re.search(r"^WORKDIR /app$", DOCKERFILE, re.M)
  assert "ENTRYPOINT" not in DOCKERFILE
  for source in re.findall(r"^COPY (.*) \./?$", DOCKERFILE, re.M):
    assert all((ROOT / name).exists() for name in source.split())


def test_what_git_ignores_is_not_copied():
  def patterns(name):
    lines = (ROOT / name).read_text().splitlines()
    return {line.removeprefix("**/").rstrip("/") for line in lines if line and line[0] != "#"}

  assert patterns(".gitignore") - patterns(".dockerignore") <= {"*.py[cod]"}
  assert ".git" in patterns(".dockerignore")

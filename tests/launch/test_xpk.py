"""The GKE launcher: the manifest that xpk's own dry run makes of a job, and bad input."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
import yaml

from dense_jax.cli import common
from dense_jax.errors import InputError
from launch import xpk
from launch.commands import CommandError
from tests.helpers import ROOT
from tests.launch.stand_ins import read_calls, write_program, write_recorders

TRAIN = ["--config", "experiments/dense_retnet_1p3b.py", "--workdir", "gs://b/retnet",
         "--config.mesh.data=1", "--config.mesh.fsdp=-1"]
PLACE = ["--name=retnet", "--cluster=my-cluster", "--project=my-project", "--zone=us-east5-b",
         "--tpu-type=v6e-16"]
IMAGE = "--image=my-registry/my-project/dense_jax:1"


@pytest.fixture(autouse=True)
def in_the_project(monkeypatch):
  monkeypatch.chdir(ROOT)


@pytest.fixture
def manifest(tmp_path, monkeypatch):
  """Returns a function that makes the JobSet with the real xpk's dry run, given more arguments."""
  try:
    xpk.find_xpk()
  except InputError:
    pytest.skip("no xpk here; `make xpk` installs it")
  monkeypatch.setenv("HOME", str(tmp_path))  # xpk keeps its settings there.
  monkeypatch.setenv("TELEMETRY_ENABLED", "false")

  def make(*arguments):
    file = tmp_path / "manifest.yaml"
    assert xpk.main([*PLACE, *TRAIN, "--dry-run", f"--manifest={file}", *arguments]) == 0
    return yaml.safe_load(file.read_text())

  return make


def pod(jobset):
  return slice_job(jobset)["spec"]["template"]["spec"]


def slice_job(jobset):
  (replicated,) = jobset["spec"]["replicatedJobs"]
  return replicated["template"]


@pytest.mark.slow
def test_manifest_has_slices_hosts_chips_and_restarts(manifest, capfd):
  jobset = manifest(IMAGE, "--slices=2", "--max-restarts=7", "--grace-seconds=240", "--spot")
  assert jobset["kind"] == "JobSet" and jobset["metadata"]["name"] == "retnet"
  assert jobset["spec"]["replicatedJobs"][0]["replicas"] == 2
  assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 7
  assert jobset["spec"]["failurePolicy"]["rules"][0]["action"] == "FailJobSet"
  spec = slice_job(jobset)["spec"]
  assert (spec["parallelism"], spec["completions"], spec["backoffLimit"]) == (4, 4, 0)
  (rule,) = spec["podFailurePolicy"]["rules"]
  assert (rule["action"], rule["onExitCodes"]["operator"]) == ("FailJob", "NotIn")
  restarted = set(rule["onExitCodes"]["values"])
  # An interruption or a crash, an abort, a kill and SIGTERM restart the job; bad input does not.
  assert {1, 128 + signal.SIGABRT, 128 + signal.SIGKILL, 128 + signal.SIGTERM} < restarted
  assert not {0, 2, common.DIVERGED} & restarted

  assert pod(jobset)["terminationGracePeriodSeconds"] == 240
  assert pod(jobset)["nodeSelector"] == {
      "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
      "cloud.google.com/gke-tpu-topology": "4x4",
  }
  (container,) = pod(jobset)["containers"]
  assert container["image"] == IMAGE.partition("=")[2]
  assert container["resources"]["limits"] == {"google.com/tpu": 4}
  out = capfd.readouterr().out
  assert "does it fit? python -m dense_jax.cli.compile" in out
  assert "$ xpk workload create" in out and "kubectl apply -f" in out
  assert "--num-slices=2" in out and "--spot" in out


@pytest.mark.slow
def test_manifest_has_the_command_and_the_environment_as_they_were_given(manifest):
  path = "gs://b/a 'quoted' $HOME {x} `date` *.jsonl"
  jobset = manifest(IMAGE, f"--config.data.path={path}", "--env=A=b c=d", "--env=B=$(date)")
  (container,) = pod(jobset)["containers"]
  assert container["env"] == [{"name": "A", "value": "b c=d"}, {"name": "B", "value": "$(date)"}]
  bash, option, script = container["command"]
  assert (bash, option) == ("bash", "-c")
  (command,) = re.findall(r"^ *\((exec python .*)\) & PID", script, re.M)
  assert shlex.split(command) == [
      "exec", "python", "-m", "dense_jax.cli.train", *TRAIN, f"--config.data.path={path}",
  ]


@pytest.mark.slow
@pytest.mark.parametrize("status", [1, 2])
def test_the_container_passes_sigterm_on_and_its_status_back(manifest, tmp_path, status):
  (container,) = pod(manifest(IMAGE))["containers"]
  write_program(tmp_path / "bin", "python", (
      "import signal, sys, time\n"
      f"signal.signal(signal.SIGTERM, lambda *_: sys.exit({status}))\n"
      f"open({str(tmp_path / 'started')!r}, 'w').close()\n"
      "time.sleep(60)\n"
  ))
  write_program(tmp_path / "bin", "sleep", "import time\ntime.sleep(0.02)")
  environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
  # SIGTERM is sent to the first process only, as Kubernetes sends it to a container's.
  process = subprocess.Popen(container["command"], env=environment, stdout=subprocess.PIPE)
  while process.poll() is None and not (tmp_path / "started").exists():
    time.sleep(0.02)
  process.send_signal(signal.SIGTERM)
  out, _ = process.communicate(timeout=30)
  assert process.returncode == status
  assert f"EXIT_CODE={status}" in out.decode()


@pytest.mark.slow
def test_a_base_image_gets_this_folder(manifest, capfd):
  jobset = manifest("--base-image=my-registry/my-project/dense_jax:1")
  (container,) = pod(jobset)["containers"]
  assert "runner" in container["image"]
  out = capfd.readouterr().out
  assert f"Adding {ROOT} to container image" in out
  assert "my-registry/my-project/dense_jax:1 --append" in out and "--workdir /app" in out


def test_without_dry_run_xpk_gets_the_same_command(tmp_path, monkeypatch, capfd):
  write_recorders(tmp_path / "bin", tmp_path / "calls", "xpk")
  monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
  arguments = [*PLACE, *TRAIN, IMAGE, "--reservation=my-block"]
  assert xpk.main(arguments) == 0
  assert xpk.main([*arguments, "--dry-run"]) == 0
  (real, _), (dry, _) = read_calls(tmp_path / "calls")
  assert dry == [*real, "--dry-run"]
  assert "--reservation=my-block" in real and "--restart-on-exit-codes=1" in real
  out = capfd.readouterr().out
  assert out.count(f"$ {shlex.join(real)}\n") == 2
  assert "xpk workload delete --workload=retnet --cluster=my-cluster" in out


def test_a_failure_of_xpk_is_ours(tmp_path, monkeypatch):
  write_program(tmp_path / "bin", "xpk", "raise SystemExit(3)")
  monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
  with pytest.raises(CommandError, match="had status 3"):
    xpk.main([*PLACE, *TRAIN, IMAGE])


def test_without_xpk_it_says_how_to_get_it(tmp_path, monkeypatch, capfd):
  monkeypatch.setenv("PATH", str(tmp_path))
  monkeypatch.setattr(xpk.sys, "prefix", str(tmp_path))
  with pytest.raises(InputError, match="`make xpk`"):
    xpk.main([*PLACE, *TRAIN, IMAGE, "--dry-run"])
  assert "$ xpk workload create" in capfd.readouterr().out


@pytest.mark.parametrize(("arguments", "message"), [
    (["--name=Retnet"], "--name = 'Retnet' is not valid"),
    (["--name=" + "a" * 41], "at most 40"),
    (["--cluster=a;b"], "--cluster = 'a;b'"),
    (["--project=My Project"], "--project = 'My Project'"),
    (["--zone=us-east5"], "expected a zone, such as us-east5-b"),
    (["--image=a b"], "--image = 'a b'"),
    (["--reservation=$(x)"], "--reservation = '$(x)'"),
    (["--max-restarts=-1"], "--max-restarts = -1 is not valid: expected an integer >= 0"),
    (["--grace-seconds=0"], "--grace-seconds = 0"),
    (["--manifest=none/x.yaml"], "expected a file in a folder that exists"),
    (["--workdir=runs/x"], "expected gs://BUCKET/..."),
    (["--config.model.width=x"], "config.model.width"),
])
def test_bad_input_submits_nothing(tmp_path, monkeypatch, arguments, message):
  write_recorders(tmp_path / "bin", tmp_path / "calls", "xpk")
  monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
  with pytest.raises(InputError, match=re.escape(message)):
    xpk.main([*PLACE, *TRAIN, IMAGE, *arguments])
  assert not read_calls(tmp_path / "calls")


def test_bad_input_is_status_2_without_a_traceback():
  process = subprocess.run(
      [sys.executable, "-m", "launch.xpk", *PLACE, *TRAIN, IMAGE, "--tpu-type=v6e-7"],
      capture_output=True, text=True, timeout=120,
  )
  assert process.returncode == 2
  assert process.stderr.startswith("error: --tpu-type = 'v6e-7' is not valid: expected")

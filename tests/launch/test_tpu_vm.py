"""The launcher of TPU VMs with a stand-in for gcloud: its calls and their order."""

import os
import pathlib
import re
import signal
import subprocess
import time

import pytest

from dense_jax.errors import InputError
from launch import commands, queued_resource, tpu_vm, workers
from launch.commands import CommandError
from tests.helpers import ROOT
from tests.launch.cloud_stand_in import Cloud
from tests.launch.stand_ins import is_running, write_program

WHERE = ["--name=retnet", "--project=my-project", "--zone=us-east5-b", "--poll-seconds=0.02"]
PATH = "gs://b/a 'quoted' $HOME {x} *.jsonl"
TRAIN = ["--config", "experiments/dense_retnet_1p3b.py", "--workdir", "gs://b/retnet",
         "--config.mesh.data=1", "--config.mesh.fsdp=-1", f"--config.data.path={PATH}"]
JOB = ["--tpu-type=v6e-16", "--env=A=b c", *TRAIN]


@pytest.fixture
def cloud(tmp_path, monkeypatch):
  """The stand-in, and a small project to send to its workers."""
  project = tmp_path / "project"
  project.mkdir()
  for name in ("pyproject.toml", "new.py", "ignored.log"):
    (project / name).touch()
  (project / ".gitignore").write_text("*.log\n")
  (project / "experiments").symlink_to(ROOT / "experiments")
  subprocess.run(["git", "init", "--quiet", project], check=True)
  monkeypatch.chdir(ROOT)
  monkeypatch.setattr(workers, "_END_SECONDS", 1)
  monkeypatch.setattr(workers, "_KILL_SECONDS", 1)
  stand_in = Cloud(tmp_path)
  monkeypatch.setenv("PATH", str(stand_in.bin), prepend=os.pathsep)
  monkeypatch.setattr(queued_resource, "SOURCE", project)
  yield stand_in
  if (tmp_path / "there").exists():
    stand_in.states("ACTIVE")
    stand_in.fails(0)
    tpu_vm.main(["delete", *WHERE])  # Ends processes that would outlive the test.


def train(*more):
  return tpu_vm.main(["train", *WHERE, *JOB, *more])


def test_from_nothing_to_the_end(cloud, capfd):
  cloud.states("ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
  assert train("--spot", "--keep") == 0
  assert cloud.verbs == ["create", "scp"]
  create = next(call for call in cloud.calls if call[1] == "create")
  assert create == [
      "queued-resources", "create", "retnet", "--project=my-project", "--zone=us-east5-b",
      "--accelerator-type=v6e-16", "--runtime-version=v2-alpha-tpuv6e", "--node-id=retnet",
      "--spot",
  ]
  for worker in range(2):
    home = cloud.home("retnet", worker)
    ((arguments, variable, folder),) = cloud.trained("retnet", worker)
    assert arguments == ["-m", "dense_jax.cli.train", *TRAIN]
    assert (variable, folder) == ("b c", str(home / "dense_jax"))
    assert (home / "dense_jax" / "new.py").is_file()
    assert not (home / "dense_jax" / "ignored.log").exists()
    assert (home / "dense_jax_job" / "log").read_text() == f"training on {worker}\n"
  out = capfd.readouterr().out
  for state in ("ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"):
    assert f"# retnet is {state}\n" in out
  assert "# all steps are done" in out


def test_the_resource_is_deleted_in_the_end(cloud):
  assert train() == 0
  assert cloud.verbs == ["create", "scp", "delete"]
  assert cloud.calls[-1][1:] == [
      "delete", "retnet", "--project=my-project", "--zone=us-east5-b", "--force", "--quiet",
  ]


def test_after_a_preemption_it_is_asked_for_again(cloud, capfd):
  cloud.trains("hang", "0")
  # The first resource is waited for, is polled once, and goes; then comes the second one.
  cloud.states("ACTIVE", "ACTIVE", "SUSPENDING", "SUSPENDED", "PROVISIONING", "ACTIVE")
  assert train("--spot") == 0
  assert cloud.verbs == ["create", "scp", "delete", "create", "scp", "delete"]
  out = capfd.readouterr().out
  assert "# the resource was preempted\n# restart 1 of at most 10\n" in out


def test_capacity_that_goes_before_it_is_ours_is_asked_for_again(cloud):
  cloud.states("PROVISIONING", "SUSPENDED", "SUSPENDED", "ACTIVE")
  assert train("--spot") == 0
  assert cloud.verbs == ["create", "delete", "create", "scp", "delete"]


def test_what_is_deleted_meanwhile_is_not_asked_for_again(cloud, capfd):
  cloud.trains("hang")
  cloud.states("ACTIVE", "ACTIVE", "DELETING")
  assert train() == 1
  assert cloud.verbs == ["create", "scp"]
  assert "# the resource was deleted" in capfd.readouterr().out


def test_a_failure_starts_all_workers_again_on_the_same_machines(cloud):
  # The second worker hangs, as in a collective without the first, and must be killed.
  cloud.trains("1", "0", second=("hang", "0"))
  assert train("--keep") == 0
  assert cloud.verbs == ["create", "scp", "scp"]
  assert [len(cloud.trained("retnet", worker)) for worker in range(2)] == [2, 2]


def test_restarts_have_an_end_and_the_log_is_shown(cloud, capfd):
  cloud.trains("134", "1", "1")
  assert train("--max-restarts=1") == 1
  assert cloud.verbs == ["create", "scp", "scp", "delete"]
  assert capfd.readouterr().out.count("training on") == 4  # Two starts, on two workers.


@pytest.mark.parametrize("status", [2, 3])
def test_bad_input_and_numbers_that_go_wrong_are_not_started_again(cloud, status):
  cloud.trains(str(status), second=("hang",))
  assert train() == status
  assert cloud.verbs == ["create", "scp", "delete"]


def test_a_resource_that_fails_is_an_error_with_its_reason(cloud, capfd):
  cloud.states("WAITING_FOR_RESOURCES", "FAILED")
  with pytest.raises(CommandError, match="retnet will not be active: state: FAILED no capacity"):
    train()
  assert cloud.verbs == ["create"]
  err = capfd.readouterr().err
  assert "retnet may still be there" in err and "launch.tpu_vm delete --name=retnet" in err


def test_it_goes_on_watching_what_trains_already(cloud, capfd):
  cloud.is_there()
  cloud.trains("hang")
  assert tpu_vm.main(["sync", *WHERE]) == 0
  assert tpu_vm.main(["run", *WHERE, *JOB]) == 0
  before = cloud.verbs
  cloud.states("ACTIVE", "ACTIVE", "ACTIVE", "SUSPENDED")
  assert train("--max-restarts=0", "--keep") == 1
  assert cloud.verbs == before
  assert "# training is running already, as it was started" in capfd.readouterr().out
  assert [len(cloud.trained("retnet", worker)) for worker in range(2)] == [1, 1]


def test_one_start_more_does_not_start_twice(cloud, capfd):
  cloud.is_there()
  cloud.trains("hang")
  tpu_vm.main(["sync", *WHERE])
  for _ in range(2):
    assert tpu_vm.main(["run", *WHERE, *JOB]) == 0
  assert capfd.readouterr().out.splitlines().count("it is running already") == 2
  assert tpu_vm.main(["status", *WHERE]) == 0
  assert "training on its workers: running, running" in capfd.readouterr().out


@pytest.mark.parametrize(("failures", "raises"), [(4, False), (40, True)])
def test_the_network_may_be_down_for_a_while(cloud, monkeypatch, failures, raises):
  cloud.trains("hang", "0")
  pause, pauses = queued_resource.QueuedResource.pause, []

  def lose_the_network(resource):
    pause(resource)
    pauses.append(resource)
    if len(pauses) == 2:
      cloud.fails(failures)
      cloud.states("ACTIVE", "SUSPENDED", "SUSPENDED", "ACTIVE")

  monkeypatch.setattr(queued_resource.QueuedResource, "pause", lose_the_network)
  if raises:
    with pytest.raises(CommandError, match="no network"):
      train()
  else:
    assert train() == 0
    assert len(pauses) > 2 + failures


def test_the_network_may_be_down_while_it_waits(cloud, capfd):
  cloud.is_there()
  cloud.states("PROVISIONING", "ACTIVE")
  cloud.fails(4)
  assert tpu_vm.main(["wait", *WHERE]) == 0
  assert capfd.readouterr().out.count("asking again") == 4


def test_how_a_job_has_ended(cloud, capfd):
  cloud.is_there()
  cloud.trains("hang")

  def status():
    capfd.readouterr()
    tpu_vm.main(["status", *WHERE])
    return re.findall(r"training on its workers: (.*)\n", capfd.readouterr().out)

  assert status() == ["absent, absent"]
  tpu_vm.main(["sync", *WHERE])
  tpu_vm.main(["run", *WHERE, *JOB])
  assert status() == ["running, running"]
  jobs = [cloud.home("retnet", worker) / "dense_jax_job" for worker in range(2)]
  for folder in jobs:
    os.killpg(int((folder / "pid").read_text()), signal.SIGKILL)
  assert status() == ["137, 137"]
  (jobs[1] / "status").unlink()  # As after a restart of the machine.
  assert status() == ["137, killed"]


def killed_with_an_orphan(cloud, *others):
  """Starts training, and kills its leaders and `others` of each worker; returns the orphans."""
  cloud.is_there()
  cloud.trains("orphan", "hang")
  tpu_vm.main(["sync", *WHERE])
  tpu_vm.main(["run", *WHERE, *JOB])
  homes = [cloud.home("retnet", worker) for worker in range(2)]
  while not all((home / "orphan").exists() and (home / "orphan").read_text() for home in homes):
    time.sleep(0.02)
  for home in homes:
    leader = int((home / "dense_jax_job" / "pid").read_text())
    for other in others:
      os.kill(other(leader), signal.SIGKILL)
    os.kill(leader, signal.SIGKILL)
    while pathlib.Path(f"/proc/{leader}").exists():  # Until its parent has asked for its status.
      time.sleep(0.02)
  return [int((home / "orphan").read_text()) for home in homes]


def test_what_a_killed_job_leaves_behind_is_killed_before_it_is_over(cloud, capfd):
  orphans = killed_with_an_orphan(cloud)
  tpu_vm.main(["status", *WHERE])
  assert "training on its workers: 137, 137" in capfd.readouterr().out
  assert not any(map(is_running, orphans))


def test_another_start_kills_what_a_job_left_whose_shell_was_killed(cloud, capfd):
  orphans = killed_with_an_orphan(cloud, parent)
  tpu_vm.main(["status", *WHERE])
  assert "training on its workers: killed, killed" in capfd.readouterr().out
  tpu_vm.main(["run", *WHERE, *JOB])
  assert not any(map(is_running, orphans))
  tpu_vm.main(["status", *WHERE])
  assert "training on its workers: running, running" in capfd.readouterr().out


def parent(pid):
  return int(pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_a_look_that_hangs_is_an_answer_that_did_not_come(tmp_path, monkeypatch):
  monkeypatch.setattr(commands, "_LOOK_SECONDS", 1)
  child = tmp_path / "child"
  write_program(tmp_path / "bin", "gcloud", (
      "import subprocess, sys, time\n"
      "child = subprocess.Popen([sys.executable, '-IS', '-c', 'import time; time.sleep(60)'])\n"
      f"open({str(child)!r}, 'w').write(str(child.pid))\n"
      "time.sleep(60)\n"
  ))
  monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
  with pytest.raises(CommandError, match="did not answer within 1 s"):
    tpu_vm.main(["status", *WHERE])
  time.sleep(0.1)
  assert not is_running(int(child.read_text()))


def test_slices_are_nodes(capfd, monkeypatch):
  monkeypatch.chdir(ROOT)
  assert train("--slices=2", "--reserved", "--runtime-version=mine",
               "--service-account=me@x.iam.gserviceaccount.com", "--dry-run") == 0
  out = capfd.readouterr().out
  assert "--node-count=2 --node-prefix=retnet --reserved --service-account=me@x" in out
  assert "--runtime-version=mine" in out and "--node-id" not in out
  for node in ("retnet-0", "retnet-1"):
    assert f"{node}:dense_jax.tar.gz --worker=all" in out
    assert out.count(f"{node} --worker=all '--command=mkdir -p ~/dense_jax_job") == 1


def test_a_dry_run_calls_nothing(cloud, capfd):
  assert train("--dry-run") == 0
  assert not cloud.calls
  out = capfd.readouterr().out
  assert all(line[0] in "#$" for line in out.splitlines())
  verbs = re.findall(r"^\$ gcloud compute tpus (?:tpu-vm|queued-resources) (\w+)", out, re.M)
  # Commands that change nothing are shown only once.
  assert verbs == ["describe", "create", "ssh", "scp", "ssh", "ssh", "delete"]


@pytest.mark.parametrize(("arguments", "message"), [
    (["train", *WHERE, *JOB, "--tpu-type=v6e-7"], "--tpu-type = 'v6e-7'"),
    (["train", *WHERE, *JOB, "--config.model.widht=8"], "did you mean config.model.width?"),
    (["train", *WHERE, *JOB, "--max-restarts=-1"], "--max-restarts = -1"),
    (["run", *WHERE, *JOB, "--workdir=/runs/x"], "expected gs://BUCKET/..."),
    (["create", *WHERE, "--tpu-type=tpu"], "--tpu-type = 'tpu'"),
    (["wait", *WHERE, "--name=a b"], "--name = 'a b'"),
    (["wait", *WHERE, "--zone=europe"], "--zone = 'europe'"),
    (["sync", *WHERE, "--slices=0"], "--slices = 0"),
    (["status", *WHERE, "--poll-seconds=-1"], "--poll-seconds = -1"),
    (["logs", *WHERE, "--worker=some"], "expected a worker's number, or all"),
    (["delete", *WHERE, "--config.seed=1"], "delete takes no configuration: --config.seed"),
])
def test_bad_input_calls_nothing(cloud, arguments, message):
  with pytest.raises(InputError, match=re.escape(message)):
    tpu_vm.main(arguments)
  assert not cloud.calls


def test_without_gcloud_it_says_so(monkeypatch, tmp_path):
  monkeypatch.setenv("PATH", str(tmp_path))
  with pytest.raises(InputError, match="gcloud is not installed"):
    tpu_vm.main(["status", *WHERE])

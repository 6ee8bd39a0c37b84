"""The numbers of the machine in a run's records, from their definitions."""

import dataclasses
import json

import jax
import pytest
from etils import epath

from dense_jax import experiment
from dense_jax.costs.chips import CHIPS, find_chip
from dense_jax.errors import InputError
from dense_jax.models.flops import train_flops
from dense_jax.runs import recording
from dense_jax.runs.recording import Recorder
from dense_jax.training import wandb_writer
from dense_jax.training.events import record_event
from dense_jax.training.loop import DataWait
from dense_jax.training.metrics import read_metrics

STEP = {"loss": 1.0, "tokens_per_second": 1e6, "train_seconds": 2.0}


@pytest.fixture(scope="module")
def config():
  return experiment.load("experiments/smoke.py:debug", [("model.vocab_size", "258")])


@pytest.mark.parametrize(("kind", "name"), [
    ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H200", "h200"), ("TPU v4", "v4"),
    ("TPU v5 lite", "v5e"), ("TPU v5", "v5p"), ("TPU v6 lite", "v6e"), ("cpu", None),
    ("NVIDIA A100-SXM4-80GB", None), ("TPU v7x", None), ("v5e", None),
    ("NVIDIA H100 PCIe", None), ("NVIDIA H100 NVL", None), ("NVIDIA H200 NVL", None),
    ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None), ("TPU v4 lite", None),
])
def test_devices_by_their_names(kind, name):
  assert find_chip(kind) is (CHIPS[name] if name else None)


def test_utilization_of_the_published_peak(tmp_path, config, monkeypatch):
  monkeypatch.setattr(recording, "find_chip", lambda kind: CHIPS["v5e"])
  recorder = Recorder(epath.Path(tmp_path), 0, config)
  recorder.write(1, STEP)
  recorder.close()
  expected = train_flops(config.model, config.data.seq_len) * 1e6 / (197e12 * jax.device_count())
  assert recorder.newest["mfu"] == pytest.approx(expected)


def test_goodput_counts_what_the_run_stands_on_over_restarts(tmp_path, config, monkeypatch):
  folder, now = epath.Path(tmp_path), [1000.0]
  monkeypatch.setattr("time.time", lambda: now[0])
  record_event(folder, 0, "start", "")
  recorder = Recorder(folder, 0, config)
  for step in (1, 2, 3):
    now[0] += 4
    recorder.write(step, STEP)
  recorder.write(3, {"heldout_loss": 1.0})
  recorder.close()
  assert [record.get("goodput") for record in read_metrics(folder)] == [0.5, 0.5, 0.5, None]
  now[0] += 8
  record_event(folder, 2, "start", "")  # Killed, and resumed from step 2: step 3 is lost.
  recorder = Recorder(folder, 2, config)
  recorder.write(3, STEP)
  recorder.close()
  assert recorder.newest["train_seconds"] == 6.0
  assert recorder.newest["goodput"] == pytest.approx(6 / 20)
  assert "mfu" not in recorder.newest  # A CPU's peak is not known.


class Number:
  """A stand-in for a number that a device computes."""

  def __init__(self, ready):
    self.is_ready = lambda: ready


def test_waiting_counts_only_while_the_devices_have_nothing_to_do(monkeypatch):
  now = iter([0.0, 10.0, 11.0, 20.0, 25.0])
  monkeypatch.setattr("dense_jax.training.loop.time.perf_counter", lambda: next(now))
  wait, batches = DataWait(), iter("abc")
  assert wait.next(batches, {"loss": Number(False)}) == "a"
  assert wait.seconds == 0
  assert wait.next(batches, {"loss": Number(True)}) == "b"
  assert wait.seconds == 1
  assert wait.next(batches, {}) == "c"  # Nothing is under way.
  assert wait.seconds == 6


def test_what_is_asked_of_wandb_without_it_is_refused(monkeypatch):
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  with pytest.raises(InputError, match=r"config.watch.wandb = 'p' .*pip install -e '\.\[wandb\]'"):
    wandb_writer.check_wandb("p")
  wandb_writer.check_wandb("")


@pytest.mark.slow
def test_wandb_gets_the_same_records(tmp_path, config, monkeypatch):
  wandb = pytest.importorskip("wandb")
  monkeypatch.setenv("WANDB_MODE", "offline")
  monkeypatch.setenv("WANDB_DIR", str(tmp_path))
  watched = dataclasses.replace(config, watch=dataclasses.replace(config.watch, wandb="project"))
  folder = epath.Path(tmp_path)
  sent = []
  log = wandb.Run.log
  monkeypatch.setattr(wandb.Run, "log", lambda self, values: (sent.append(values),
                                                             log(self, values)))
  for first in (0, 2):  # A run that resumes is the same run there.
    recorder = Recorder(folder, first, watched)
    recorder.write(first + 1, STEP)
    recorder.close()
  assert [values["step"] for values in sent] == [1, 3]
  assert sent[0]["loss"] == 1.0 and "goodput" in sent[0]
  name = (folder / "wandb_id").read_text()
  assert len(name) == 32
  assert len(list((tmp_path / "wandb").glob(f"offline-run-*-{name}"))) >= 1
  assert [json.loads(line)["step"] for line in (folder / "metrics.jsonl").open()] == [1, 3]

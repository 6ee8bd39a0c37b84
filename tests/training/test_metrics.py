"""metrics.jsonl and events: damage is reported and kept, and written records stay."""

import errno
import json
import os
import signal
import struct
import subprocess
import sys

import pytest
from etils import epath
from tensorboardX.proto import event_pb2

from dense_jax.training.metrics import MetricsWriter, read_metrics
from tests.helpers import ROOT

BAD = {
    "garbage": b"garbage", "blank": b"", "not UTF-8": b'{"step": 2, "\xff": 1}', "no step": b"{}",
    "a list": b"[1]", "a number": b"7", "null": b"null", "a word for a step": b'{"step": "2"}',
    "cut": b'{"step": 2, "lo', "deep": b"[" * 100_000, "digits": b'{"step": ' + b"9" * 5000 + b"}",
    "a word for a loss": b'{"step": 2, "loss": "x"}', "half a step": b'{"step": 2.5}',
    "NUL": b"\0" * 40, "true": b'{"step": true}',
}


def line(step):
  return json.dumps({"step": step, "loss": step / 3}).encode()


def events(folder):
  """Returns (step, name, value) of all events, and the steps from which earlier ones are void."""
  values, starts = [], []
  for file in sorted((folder / "tensorboard").iterdir(), key=lambda f: f.stat().st_mtime_ns):
    content = file.read_bytes()
    while content:
      (length,) = struct.unpack("<Q", content[:8])
      event = event_pb2.Event.FromString(content[12 : 12 + length])
      content = content[16 + length :]
      values += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
      if event.session_log.status == event_pb2.SessionLog.START:
        starts.append(event.step)
  return values, starts


@pytest.mark.parametrize("kind", BAD)
def test_a_damaged_line_costs_itself_alone(tmp_path, kind, caplog):
  before = b"\n".join([line(1), BAD[kind], line(2), line(3), line(9)]) + b"\n"
  (tmp_path / "metrics.jsonl").write_bytes(before)
  folder = epath.Path(tmp_path)
  assert [record["step"] for record in read_metrics(folder)] == [1, 2, 3, 9]
  writer = MetricsWriter(folder, 3)
  writer.write(4, {"loss": 0.1})
  writer.close()
  assert [record["step"] for record in read_metrics(folder)] == [1, 2, 3, 4]
  assert "1 lines are damaged" in caplog.text and "metrics.jsonl.damaged-1" in caplog.text
  assert (tmp_path / "metrics.jsonl.damaged-1").read_bytes() == before


def test_what_was_set_aside_stays(tmp_path):
  for number in (1, 2):
    (tmp_path / "metrics.jsonl").write_bytes(b"x%d\n" % number)
    MetricsWriter(epath.Path(tmp_path), 0).close()
    assert (tmp_path / f"metrics.jsonl.damaged-{number}").read_bytes() == b"x%d\n" % number
  assert (tmp_path / "metrics.jsonl.damaged-1").read_bytes() == b"x1\n"


def test_a_line_that_a_kill_cut_off_is_no_damage(tmp_path, caplog):
  (tmp_path / "metrics.jsonl").write_bytes(line(1) + b"\n" + line(2)[:9])
  MetricsWriter(epath.Path(tmp_path), 5).close()
  assert [record["step"] for record in read_metrics(epath.Path(tmp_path))] == [1]
  assert not caplog.text and not list(tmp_path.glob("*.damaged*"))


def test_not_finite_numbers_are_lines_too(tmp_path):
  writer = MetricsWriter(epath.Path(tmp_path), 0)
  writer.write(1, {"loss": float("nan"), "grad_norm": float("inf")})
  writer.close()
  MetricsWriter(epath.Path(tmp_path), 1).close()
  assert len(read_metrics(epath.Path(tmp_path))) == 1 and not list(tmp_path.glob("*.damaged*"))


def test_what_a_full_disk_refuses_is_written_with_the_next_record(tmp_path, monkeypatch, caplog):
  writer = MetricsWriter(epath.Path(tmp_path), 0)
  written = os.write
  writer.write(1, {"loss": 1.0})
  with monkeypatch.context() as full:

    def fails(handle, content):
      if len(content) < 9:
        raise OSError(errno.ENOSPC, "No space left on device")
      return written(handle, content[:9])  # A disk has some room left.

    full.setattr(os, "write", fails)
    writer.write(2, {"loss": 2.0})
    writer.write(3, {"loss": 3.0})
    assert [line["step"] for line in read_metrics(epath.Path(tmp_path))] == [1]
  writer.write(4, {"loss": 4.0})
  writer.close()
  assert [line["step"] for line in read_metrics(epath.Path(tmp_path))] == [1, 2, 3, 4]
  assert caplog.text.count("records cannot be written") == 1


def test_events_hold_what_the_lines_hold_whenever_it_is_killed(tmp_path):
  script = """
import os, signal, sys
from etils import epath
from dense_jax.training.metrics import MetricsWriter
writer = MetricsWriter(epath.Path(sys.argv[1]), int(sys.argv[2]))
for step in range(int(sys.argv[2]) + 1, int(sys.argv[3]) + 1):
  writer.write(step, {"loss": step / 4, "grad_norm": float(step)})
os.kill(os.getpid(), signal.SIGKILL)
"""
  for first, last in ((0, 5), (3, 7)):
    killed = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), str(first), str(last)], cwd=ROOT
    )
    assert killed.returncode == -signal.SIGKILL
  values, starts = events(tmp_path)
  assert starts == [1, 4]
  assert [v for v in values if v[1] == "loss"] == [
      (step, "loss", step / 4) for step in (1, 2, 3, 4, 5, 4, 5, 6, 7)
  ]
  assert [record["step"] for record in read_metrics(epath.Path(tmp_path))] == list(range(1, 8))

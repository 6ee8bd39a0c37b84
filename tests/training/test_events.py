"""events.jsonl: what is appended is read again, and damage costs itself alone."""

import json
import time

import pytest
from etils import epath

from dense_jax.training.events import EVENTS_FILE, Event, read_events, record_event


def test_events_are_read_in_order(tmp_path):
  folder, before = epath.Path(tmp_path), time.time()
  assert read_events(folder) == []
  record_event(folder, 3, "skipped", "a loss of NaN")
  record_event(folder, 2, "returned", "to step 2")
  read = read_events(folder)
  assert [(event.step, event.kind, event.text) for event in read] == [
      (3, "skipped", "a loss of NaN"), (2, "returned", "to step 2")
  ]
  assert before <= read[0].time <= read[1].time <= time.time()


def test_an_unknown_kind_is_an_error(tmp_path):
  with pytest.raises(ValueError, match="'skiped': expected one of start, killed"):
    record_event(epath.Path(tmp_path), 0, "skiped", "")
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", [
    b"garbage\n", b"\n", b"[1]\n", b'{"time": 1.0}\n', b"\0" * 9 + b"\n", b'"x"\n',
    b'{"time": 1.0, "step": "1", "kind": "end", "text": ""}\n',
    b'{"time": 1.0, "step": 1, "kind": "end", "text": "", "more": 1}\n',
    b'{"time": 1.0, "st',  # A kill cut it off.
])
def test_a_damaged_line_costs_itself_alone(tmp_path, damage):
  folder = epath.Path(tmp_path)
  record_event(folder, 1, "start", "one")
  with open(tmp_path / EVENTS_FILE, "ab") as file:
    file.write(damage)
  record_event(folder, 2, "end", "two")
  assert [event.text for event in read_events(folder)] == ["one", "two"]


def test_a_line_is_one_object(tmp_path):
  record_event(epath.Path(tmp_path), 7, "set aside", "a\nb")
  (line,) = (tmp_path / EVENTS_FILE).read_text().splitlines()
  values = json.loads(line)
  assert Event(**values) == read_events(epath.Path(tmp_path))[0]
  assert [*values] == ["time", "step", "kind", "text"]

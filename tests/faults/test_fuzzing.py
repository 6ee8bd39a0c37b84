"""Files and options that hypothesis has changed are read, or refused with an InputError."""

import pytest

from tests.faults import fuzzing


@pytest.fixture(scope="module")
def watch():
  return fuzzing.Watch()


@pytest.mark.parametrize("name", fuzzing.TARGETS)
def test_nothing_but_an_input_error(name, tmp_path, watch):
  tried, refused = fuzzing.fuzz(fuzzing.TARGETS[name], tmp_path, 60, watch)
  assert tried >= 60 and refused


@pytest.mark.exhaustive
# Of orbax, which leaves the rest of a read behind where a part of it has failed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", fuzzing.TARGETS)
def test_nothing_but_an_input_error_in_many(name, tmp_path, watch):
  tried, refused = fuzzing.fuzz(fuzzing.TARGETS[name], tmp_path, 100, watch)
  print(f"{name}: {tried} examples, {refused} refused, none did anything else")
  assert refused


def test_what_must_not_be_done_is_noticed(tmp_path, watch):
  with pytest.raises(AssertionError, match="open /"), watch.over(tmp_path / "inside"):
    (tmp_path / "outside").write_text("")

"""Which steps of a run are profiled, and what is said where none is."""

from types import SimpleNamespace

import jax
import pytest
from etils import epath

from dense_jax.config import WatchConfig
from dense_jax.runs.profiling import Profile
from dense_jax.training.loop import Moment


@pytest.mark.parametrize(("first", "last", "profiled", "said"), [
    (0, 9, [5, 6], ""),
    (3, 9, [5, 6], ""),
    (0, 5, [5], ""),
    (0, 4, [], "and the run ended before it"),
    (0, 3, [], "and the run ended before it"),
    (9, 9, [], "and the run ended before it"),
    (4, 9, [], "and step 5 is the first that this process has done"),
])
def test_what_is_profiled_and_said(tmp_path, monkeypatch, capsys, first, last, profiled, said):
  on, found = [], []
  monkeypatch.setattr(jax.profiler, "start_trace", on.append)
  monkeypatch.setattr(jax.profiler, "stop_trace", on.clear)
  profile = Profile(epath.Path(tmp_path), WatchConfig(profile_from=5, profile_steps=2))
  (hook,) = profile.hooks()
  for step in range(first + 1, last + 1):
    found += [step] * len(on)
    hook.run(Moment(step, SimpleNamespace(step=step), interrupted=False))
  profile.close()
  assert not on and found == profiled
  expected = f"no step is profiled: config.watch.profile_from = 5, {said}\n" if said else ""
  assert capsys.readouterr().out == expected
  quiet = Profile(epath.Path(tmp_path), WatchConfig())
  assert not quiet.hooks()
  quiet.close()
  assert not capsys.readouterr().out

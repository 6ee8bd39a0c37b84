"""Records some steps of a run with `jax.profiler`."""

import jax
import tqdm
from etils import epath

from dense_jax.config import WatchConfig, invalid
from dense_jax.files import is_remote
from dense_jax.training.loop import Hook, Moment

PROFILE_FOLDER = "profile"


class Profile:
  """A profile of a run's steps `watch.profile_from` and following, in the run's folder.

  TensorBoard's profile plugin and Perfetto show it. The devices are idle before and after, so that
  it holds these steps as a whole.
  """

  def __init__(self, workdir: epath.Path, config: WatchConfig) -> None:
    """Records nothing yet.

    Raises:
      InputError: the run's folder is in a bucket, to which the profiler does not write.
    """
    if config.profile_from and is_remote(workdir):
      raise invalid("config.watch.profile_from", config.profile_from, "0 with a --workdir in a "
                    "bucket, to which jax.profiler does not write")
    self._folder = workdir / PROFILE_FOLDER
    self._before = config.profile_from - 1
    self._last = self._before + config.profile_steps
    self._records = False
    self._is_told = not config.profile_from  # Whether there is nothing to say at the end.

  def hooks(self) -> list[Hook]:
    """Returns the hook that begins and ends the profile; none if there is to be none."""
    return [Hook(1, self._run)] if self._before > 0 else []

  def _run(self, moment: Moment) -> None:
    if self._records:
      self._is_told = True
      if moment.step == self._last or moment.interrupted:
        jax.block_until_ready(moment.state.step)
        self.close()
    elif moment.step == self._before and not moment.interrupted:
      jax.block_until_ready(moment.state.step)
      jax.profiler.start_trace(self._folder)
      self._records = True
    elif moment.step > self._before:
      self._tell(f"step {moment.step} is the first that this process has done")

  def close(self) -> None:
    """Ends the profile, if it is being recorded; says so if none was."""
    self._tell("the run ended before it")
    if self._records:
      self._records = False
      jax.profiler.stop_trace()

  def _tell(self, why: str) -> None:
    """Says that no step is profiled, unless one is or that was said."""
    if not self._is_told:
      self._is_told = True
      tqdm.tqdm.write(
          f"no step is profiled: config.watch.profile_from = {self._before + 1}, and {why}"
      )

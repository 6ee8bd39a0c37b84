"""What inspect_data shows."""

import matplotlib.image
import numpy as np
import pytest

from dense_jax.cli import inspect_data
from dense_jax.data.batches import TrainBatches
from dense_jax.data.corpus.opening import Corpus
from dense_jax.errors import InputError
from tests.data.corpus.texts import run, write_corpus
from tests.helpers import ROOT

SMOKE = ["--config", str(ROOT / "experiments/smoke.py:debug")]


@pytest.fixture
def arguments(tmp_path):
  text = write_corpus(tmp_path / "text")
  run(text, tmp_path / "out", "--heldout-every", "4", "--part-field", "meta.pile_set_name")
  return [*SMOKE, f"--config.data.path={tmp_path / 'out'}", "--config.data.seq_len=64",
          "--config.train.batch_size=4", f"--config.data.cache_dir={tmp_path / 'cache'}"]


def test_text_and_picture(arguments, tmp_path, capsys):
  mixture = "--config.data.mixture=Books3=3,Github=1; 7: Github=1"
  image = tmp_path / "images/batch.png"
  assert not inspect_data.main([*arguments, mixture, "--step", "6", "--rows", "1", "--verify",
                                "--image", str(image)])
  out = capsys.readouterr().out
  assert "all shards are as they were written" in out
  corpus = Corpus(tmp_path / "out")
  for name in ("Books3", "Github", "Pile-CC"):
    (line,) = [line.split() for line in out.splitlines() if line.startswith(f"part {name}")]
    store = corpus.train.parts[name]
    assert line[2:4] == [f"{store.num_documents:,}", f"{store.num_tokens:,}"]
    assert line[5] == f"{store.num_windows(64):,}"
  assert "the batch of step 6: 4 rows of 64 tokens" in out
  assert "mixture: Books3 3, Github 1, Pile-CC 0" in out
  assert "\nrow 0\n" in out and "\nrow 1\n" not in out and "line " in out
  picture = matplotlib.image.imread(image)
  assert picture.ndim == 3 and np.ptp(picture) > 0.5

  assert not inspect_data.main([*arguments, mixture, "--step", "7", "--rows", "0"])
  assert "mixture: Books3 0, Github 4, Pile-CC 0" in capsys.readouterr().out


def test_the_batch_is_the_one_that_a_run_trains_on(arguments, tmp_path, capsys):
  inspect_data.main([*arguments, "--step", "3", "--rows", "4", "--config.data.packing=stream"])
  shown = capsys.readouterr().out
  corpus = Corpus(tmp_path / "out")
  batches = TrainBatches(corpus.train, 64, 4, 0, start_step=3)
  batch = next(batches)
  batches.close()
  segments = [int(np.max(ids)) for ids in batch.segments.ids_BT]
  sizes = [int(np.sum(ids == 1)) for ids in batch.segments.ids_BT]
  rows = shown.split("row ")[1:]
  assert [len(row.strip().splitlines()) - 1 for row in rows[-4:]] == segments
  assert [int(row.splitlines()[1].split()[1]) for row in rows[-4:]] == sizes


def test_packed_rows_and_their_padding(arguments, capsys):
  inspect_data.main([*arguments, "--config.data.packing=best_fit", "--rows", "0"])
  out = capsys.readouterr().out
  assert "without target" in out and "%" in out


def test_a_damaged_shard_is_named(arguments, tmp_path):
  shard = min((tmp_path / "out/shards").glob("*.array_record"))
  content = bytearray(shard.read_bytes())
  content[len(content) // 2] ^= 1
  shard.write_bytes(content)
  with pytest.raises(InputError, match=f"{shard.name} is damaged: expected the SHA-256"):
    inspect_data.main([*arguments, "--verify"])


@pytest.mark.parametrize("options", [["--step", "-1"], ["--rows", "-1"]])
def test_what_is_not_valid(options):
  with pytest.raises(InputError, match=rf"^{options[0]} = -1 is not valid"):
    inspect_data.main([*SMOKE, *options])


def test_a_row_that_does_not_fit_the_memory_is_refused(arguments, monkeypatch):
  monkeypatch.setattr(inspect_data, "host_memory", lambda: 64 << 30)
  for packing in ("best_fit", "stream"):
    with pytest.raises(InputError, match=r"seq_len than 2147483647: the tokens of a batch take"):
      inspect_data.main([*arguments, "--config.data.seq_len=2147483647",
                         f"--config.data.packing={packing}"])

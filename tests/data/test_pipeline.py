"""A configuration's data."""

from dense_jax.config import DataConfig
from dense_jax.data import pipeline
from dense_jax.data.tokenizer import ByteTokenizer


def test_load_datasets(tmp_path):
  text = "".join(f"line {number} of the text\n" for number in range(400))
  (tmp_path / "a.txt").write_text(text)
  config = DataConfig(
      path=str(tmp_path / "a.txt"), tokenizer="bytes", cache_dir=str(tmp_path / "cache")
  )
  done = []
  data = pipeline.load_datasets(config, done.append)
  assert isinstance(data.tokenizer, ByteTokenizer)
  assert data.train.num_bytes + data.heldout.num_bytes == len(text)
  assert done == [data.train.num_bytes, data.heldout.num_bytes]
  assert "".join(d.text for s in data.sources for d in s) == text

  again = pipeline.load_datasets(config, done.append)
  assert again.fingerprint == data.fingerprint and len(done) == 2
  (tmp_path / "a.txt").write_text(text + "more\n" * 20)
  assert pipeline.load_datasets(config).fingerprint != data.fingerprint

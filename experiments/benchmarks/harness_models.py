"""The models of the harness benchmark: briefly trained, in folders that transformers loads."""

import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from dense_jax import experiment, sharding
from dense_jax.batch import Batch, Segments
from dense_jax.config import ExperimentConfig
from dense_jax.interop.save import save_hf
from dense_jax.models.params import with_params
from dense_jax.training.step import Trainer

END = "<|endoftext|>"
FAMILIES = ("mamba", "mamba2")
_WINDOW = 256
_ROWS = 8


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> Any:
  """Trains a byte-level BPE tokenizer whose only special token, id 0, begins and ends texts.

  Args:
    texts: what it is trained on.
    vocabulary: the number of its ids, if the texts have as many.

  Returns:
    A `tokenizers.Tokenizer`.
  """
  import tokenizers
  from tokenizers import decoders, models, pre_tokenizers, trainers

  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
      vocab_size=vocabulary, special_tokens=[END], show_progress=False,
      initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
  )
  tokenizer.train_from_iterator(texts, trainer)
  return tokenizer


def tokenizer_files(tokenizer: Any) -> dict[str, bytes]:
  """Returns the files of a tokenizer as transformers reads them: name -> content."""
  described = {
      "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END, "eos_token": END,
      "clean_up_tokenization_spaces": False,
  }
  return {
      "tokenizer.json": tokenizer.to_str().encode(),
      "tokenizer_config.json": json.dumps(described, indent=2).encode(),
  }


def settings(family: str, width: int, layers: int, vocabulary: int, steps: int) -> ExperimentConfig:
  """Makes the configuration of a small model that transformers has too."""
  values = experiment.default_config(family)
  values.model.update(vocab_size=vocabulary, width=width, layers=layers)
  values.data.seq_len = _WINDOW
  values.train.update(batch_size=_ROWS, steps=steps)
  values.optimizer.learning_rate = 3e-3
  return experiment.resolve(values)


def make_model(
    config: ExperimentConfig, ids: np.ndarray, tokenizer: Any, folder: pathlib.Path,
    done: Callable[[], object],
) -> float:
  """Trains a model on windows of a text, and writes it with its tokenizer.

  Args:
    config: the configuration; all its steps are taken.
    ids: int32, the text's tokens.
    tokenizer: the tokenizer of the ids, which goes into the folder.
    folder: a new folder.
    done: called after each step.

  Returns:
    The loss of the last step, in nats per token.
  """
  trainer = Trainer(config, sharding.make_mesh(config.mesh, jax.devices()[:1]))
  state, random, loss = trainer.init(0), np.random.default_rng(0), float("nan")
  for _ in range(config.train.steps):
    starts = random.integers(0, len(ids) - _WINDOW, _ROWS)
    # Any: the dataclasses' fields are annotated as jax arrays, and these are numpy arrays.
    window: Any = np.stack([ids[start : start + _WINDOW + 1] for start in starts])
    shape = window[:, 1:].shape
    positions: Any = np.broadcast_to(np.arange(_WINDOW, dtype=np.int32), shape)
    ones: Any = np.ones(shape, np.int32)
    batch = Batch(window[:, :-1], window[:, 1:], ones.astype(bool), Segments(positions, ones))
    state, metrics = trainer.train_step(state, trainer.put(batch))
    loss = float(metrics["loss"])
    done()
  save_hf(
      with_params(trainer.model, state.params), str(folder), bos_token_id=0, eos_token_id=0,
      files=tokenizer_files(tokenizer),
  )
  return loss

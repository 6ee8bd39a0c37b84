"""Right answers of a synthetic task: counts by hand, padding, chunks, batch sizes, meshes."""

import jax
import numpy as np
import pytest

from dense_jax.batch import Batch, Segments
from dense_jax.config import DataConfig, ExperimentConfig, MeshConfig, TaskConfig, TrainConfig
from dense_jax.data.batches import heldout_batches
from dense_jax.data.pipeline import load_datasets
from dense_jax.evaluation.evaluators import HeldOutLoss, Snapshot
from dense_jax.evaluation.exact_match import AnswerCounter, Answers, ExactMatch, count_answers
from dense_jax.evaluation.perplexity import Scorer
from dense_jax.models.params import get_params
from dense_jax.runs.evaluating import with_standard
from dense_jax.sharding import make_mesh
from dense_jax.training.step import Trainer
from tests.builders import model_config, random_model

T = 12
TASK = TaskConfig("mqar", vocab_size=10, size=2, heldout=13, eval_lengths="9")


@pytest.fixture(scope="module")
def model():
  return random_model(model_config("gau_retnet", vocab_size=10, chunk=3))


def _settings(model, **mesh):
  return ExperimentConfig(
      model=model.config, data=DataConfig(seq_len=T, task=TASK),
      train=TrainConfig(batch_size=4, loss_chunk=5, eval_batches=0), mesh=MeshConfig(**mesh),
  )


@pytest.mark.parametrize("chunk", [1, 5, 100])
def test_the_most_likely_id_is_that_of_the_largest_logit(model, chunk):
  (batch, *_) = heldout_batches(load_datasets(_settings(model).data).heldout, T, 5)
  logits_BTV = np.asarray(model(batch.tokens_BT))
  found_BT = model.most_likely(batch, chunk=chunk)
  assert found_BT.dtype == np.int32
  np.testing.assert_array_equal(found_BT, logits_BTV.argmax(axis=-1))


def test_answers_counted_by_hand(model):
  """Of five rows one is padding: three answers right of six, one row exact of four."""
  rng = np.random.default_rng(0)
  tokens_BT = rng.integers(0, 10, (5, T)).astype(np.int32)
  ids_BT = np.repeat([[1], [1], [1], [1], [0]], T, axis=1).astype(np.int32)
  positions_BT = np.tile(np.arange(T, dtype=np.int32), (5, 1)) * ids_BT
  segments = Segments(ids_BT=ids_BT, positions_BT=positions_BT)
  mask_BT = np.zeros((5, T), bool)
  mask_BT[0, [3, 7]] = mask_BT[1, [0, 11]] = mask_BT[2, 5] = mask_BT[3, 4] = True
  batch = Batch(tokens_BT, tokens_BT, mask_BT, segments)
  targets_BT = np.array(model.most_likely(batch, chunk=T))
  for row, place in ((1, 11), (2, 5), (3, 4)):
    targets_BT[row, place] = (targets_BT[row, place] + 1) % 10
  counter = AnswerCounter(model, chunk=5)
  answers = counter(
      get_params(model), [Batch(tokens_BT, targets_BT, mask_BT, segments)], jax.device_put
  )
  assert answers == Answers(right=3, targets=6, exact=1, rows=4)
  assert answers.shares() == {"accuracy": 0.5, "exact": 0.25}


@pytest.mark.parametrize("counter", [AnswerCounter, Scorer])
def test_rows_without_a_target_have_no_score(model, counter):
  with pytest.raises(ValueError, match="no held-out targets"):
    counter(model, chunk=5)(get_params(model), [], jax.device_put)


@pytest.mark.slow
def test_the_evaluator_scores_all_rows_and_further_lengths(model):
  settings = _settings(model)
  data = load_datasets(settings.data)
  seen = Snapshot(1, settings, model, get_params(model), data, slice(None), jax.device_put)
  names = [evaluator.name for evaluator in with_standard([], settings)]
  assert names == ["heldout", "task"]
  assert set(HeldOutLoss().evaluate(seen)) == {"loss"}
  numbers = ExactMatch().evaluate(seen)
  assert list(numbers) == ["accuracy", "exact", "accuracy_9", "exact_9"]
  counter = AnswerCounter(model, chunk=100)
  for batch_size in (1, 13):
    again = count_answers(
        counter, get_params(model), settings.data, jax.device_put, batch_size=batch_size
    )
    assert again == pytest.approx(numbers)
  assert numbers["accuracy"] * 26 == pytest.approx(round(numbers["accuracy"] * 26))
  line = ExactMatch().describe({"accuracy": 0.5, "exact": 0.25}, seen)
  assert line == "mqar: accuracy 0.5000, exact 0.2500"


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [
    {"data": 2}, *(pytest.param(mesh, marks=pytest.mark.exhaustive)
                   for mesh in ({"data": 1, "sequence": 2}, {"tensor": 2})),
])
def test_any_mesh_counts_the_same(model, mesh):
  settings = _settings(model, **mesh)
  trainer = Trainer(settings, make_mesh(settings.mesh, jax.devices()[:2]))
  params = {
      name: jax.device_put(leaf, trainer.state_shapes.params[name].sharding)
      for name, leaf in get_params(model).items()
  }
  batches = heldout_batches(load_datasets(settings.data).heldout, T, 4)
  found = AnswerCounter(trainer.model, chunk=5)(params, batches, trainer.put)
  batches = heldout_batches(load_datasets(settings.data).heldout, T, 4)
  assert found == AnswerCounter(model, chunk=5)(get_params(model), batches, jax.device_put)

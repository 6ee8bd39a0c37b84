"""lm-evaluation-harness with our models as its back end; slow tests use the real package."""

import json
import sys

import jax
import numpy as np
import pytest

from dense_jax import runs
from dense_jax.cli import evaluate
from dense_jax.data.byte_tokenizer import ByteTokenizer
from dense_jax.data.converted import converted_files
from dense_jax.data.hugging_face_tokenizer import HuggingFaceTokenizer
from dense_jax.data.tokenizer import SentencePieceTokenizer
from dense_jax.data.tokenizer_training import train_sentencepiece
from dense_jax.errors import InputError
from dense_jax.evaluation import harness as adapter
from dense_jax.evaluation.harness_tasks import DEFINITIONS
from dense_jax.evaluation.likelihood import encode_pairs
from dense_jax.evaluation.task_data import find_task_files, load_task, read_records
from dense_jax.evaluation.tasks import TASKS
from dense_jax.interop.save import save_hf
from dense_jax.models.params import get_params
from dense_jax.runs import harness
from tests import task_files
from tests.builders import model_config, random_model
from tests.data import hugging_face

VOCABULARY = ByteTokenizer.vocab_size


def loaded(family: str = "mamba2", **options) -> runs.LoadedModel:
  model = random_model(model_config(family, vocab_size=VOCABULARY, **options))
  return runs.LoadedModel("a model", ByteTokenizer(), model, get_params(model))


def instances(kind: str, *arguments):
  from lm_eval.api.instance import Instance

  return [Instance(kind, {}, pair, number) for number, pair in enumerate(arguments)]


def by_hand(model, context: list[int], target: list[int]) -> tuple[float, bool]:
  """The log-likelihood of a continuation, and whether it is greedy, without a batch or a state."""
  logits_TV = model(np.array([context + target]))[0, len(context) - 1 : -1]
  log_p_TV = np.asarray(jax.nn.log_softmax(logits_TV), np.float64)
  greedy = bool((log_p_TV.argmax(-1) == target).all())
  return float(sum(log_p_TV[at, token] for at, token in enumerate(target))), greedy


def test_without_the_package_the_error_names_the_extra(monkeypatch):
  monkeypatch.setitem(sys.modules, "lm_eval", None)
  with pytest.raises(InputError, match=r"pip install -e '\.\[eval\]'"):
    adapter.require()


def test_every_task_has_a_definition_of_the_harness():
  assert DEFINITIONS.keys() == TASKS.keys()


@pytest.mark.slow
@pytest.mark.parametrize("shots", [pytest.param(0, marks=pytest.mark.exhaustive), 1])
def test_the_harness_asks_and_counts_as_our_tasks_do(tmp_path, shots):
  task_files.write_all(tmp_path)
  task_files.write_lines(tmp_path / "arc_easy_validation.jsonl", [
      {"question": "What flies?", "choices": ["cats", "birds"], "label": 1}])
  model = loaded()
  results = harness.run_harness(
      harness.harness_model(model), list(TASKS), data=str(tmp_path), shots=shots,
      first_shots=True, samples=True,
  )
  assert "lambada_openai" in harness.table(results)
  found = harness.summary(results)["tasks"]
  assert len(found) == len(TASKS)
  data = [load_task(name, str(tmp_path), shots=shots) for name in TASKS]
  for score in runs.evaluate_tasks(model, data).scores:
    name = score.data.task
    theirs = DEFINITIONS[name].name
    samples = sorted(results["samples"][theirs], key=lambda sample: sample["doc_id"])
    assert len(samples) == len(score.data.items)
    for sample, item, scored in zip(samples, score.data.items, score.scored, strict=True):
      asked = [tuple(pair) for pair in sample["arguments"]]
      answers = [response[0] for response in sample["resps"]]
      if name == "wikitext":
        assert asked == [(item.pairs[0][1],)]
        assert answers == pytest.approx([scored[0].log_likelihood], rel=1e-6)
        continue
      assert asked == [tuple(pair) for pair in item.pairs]
      assert [answer[1] for answer in answers] == [each.greedy for each in scored]
      expected = [each.log_likelihood for each in scored]
      assert [answer[0] for answer in answers] == pytest.approx(expected, rel=1e-6)
    for metric, value in score.metrics.values.items():
      if metric != "acc_bytes":  # Which the harness's definitions do not ask for.
        assert found[theirs][metric] == pytest.approx(value, rel=1e-6), (name, metric)
      if metric.startswith("acc") and metric != "acc_bytes":
        error = score.metrics.errors[metric]
        assert found[theirs][metric + "_stderr"] == pytest.approx(error)


@pytest.mark.exhaustive
def test_by_default_each_prompt_has_other_examples(tmp_path):
  task_files.write_lines(tmp_path / "piqa_valid.jsonl", [
      {"goal": f"Open jar {i}", "sol1": "turn it", "sol2": "hit it", "label": i % 2}
      for i in range(6)
  ])
  results = harness.run_harness(
      harness.harness_model(loaded()), ["piqa"], data=str(tmp_path), shots=2, samples=True
  )
  prompts = [sample["arguments"][0][0] for sample in results["samples"]["piqa"]]
  examples = [prompt.split("\n\n")[:-1] for prompt in prompts]
  assert all(len(set(pair)) == 2 for pair in examples)
  for number, pair in enumerate(examples):  # None of them is the document itself.
    assert not any(f"jar {number}\n" in example for example in pair)
  assert len(set(map(tuple, examples))) > 1
  assert results["n-shot"]["piqa"] == 2


@pytest.mark.slow
def test_hellaswag_is_read_as_the_harness_reads_it(tmp_path):
  import datasets
  from lm_eval.tasks.hellaswag.utils import process_docs

  task_files.write_all(tmp_path)
  documents = [line for line in task_files.LINES["hellaswag"][1] if "ctx_a" in line]
  rows = [{**line, "label": str(line["label"])} for line in documents]
  theirs = process_docs(datasets.Dataset.from_list(rows))
  scored, _ = find_task_files("hellaswag", str(tmp_path))
  for row, record in zip(theirs, read_records("hellaswag", scored), strict=False):
    assert (record.fields["query"], list(record.choices)) == (row["query"], row["choices"])
    assert record.gold == row["gold"]


HARD = [
    ("He said", " no"), ("He said ", "no"), ("line\n\n", "\n next"), ("", "start"), ("  ", "start"),
    ("def function", "_1(self, value)"), ("return self.call", "(37)"), ("caf", "\u00e9"),
    ("the cat sat on numb", "er 4"), ("\u00e9\u0301 \u65e5", "\u672c"), ("a\r", "\nb"), ("x", ""),
    ("tab\t", "\tend"), ("<|endoftext|>x", " y"), ("    if value > 3", ":\n        return"),
]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [
    "sentencepiece", *(pytest.param(kind, marks=pytest.mark.exhaustive)
                       for kind in ("bytes", "byte_level", "llama")),
])
def test_the_border_is_where_the_harness_puts_it(tmp_path, kind):
  if kind == "bytes":
    tokenizer = ByteTokenizer()
  elif kind == "sentencepiece":  # Its pieces span spaces and line ends.
    train_sentencepiece(hugging_face.TEXT, 500, tmp_path / "model")
    tokenizer = SentencePieceTokenizer((tmp_path / "model").read_bytes())
  else:
    tokenizer = HuggingFaceTokenizer(getattr(hugging_face, kind)())
  lm = harness.register()(adapter.Answers("", tokenizer, None, None))
  spans = 0
  for context, text in HARD:
    [request] = encode_pairs(tokenizer, [(context, text)])
    if not context.strip():
      ids = tokenizer.encode(context + text)
      assert request.context_ids == (tokenizer.bos_id,) and list(request.target_ids) == ids
      continue
    before, target = lm._encode_pair(context, text)
    assert (list(request.context_ids), list(request.target_ids)) == (before, target)
    spans += lm.tok_encode(context + text)[: len(before)] != before
  assert spans or kind in ("bytes", "byte_level", "llama")


@pytest.mark.slow
@pytest.mark.parametrize("family", [
    "mamba", pytest.param("transformer", marks=pytest.mark.exhaustive),
])
def test_log_likelihoods_by_hand(family):
  model = loaded(family)
  lm = harness.harness_model(model)
  pairs = [("The sky is", " blue"), ("", "abc"), ("a ", "b"), ("   ", "z"), ("x", "")]
  answers = lm.loglikelihood(instances("loglikelihood", *pairs))
  bos = [ByteTokenizer.bos_id]
  for (context, text), (log_likelihood, greedy) in zip(pairs, answers, strict=True):
    before, after = (context.rstrip(), context[len(context.rstrip()):] + text)
    expected = by_hand(model.model, bos + list(before.encode()), list(after.encode()))
    if text:
      assert (log_likelihood, greedy) == (pytest.approx(expected[0], abs=1e-4), expected[1])
    else:
      assert (log_likelihood, greedy) == (0.0, True)


@pytest.mark.slow
def test_the_greedy_continuation_is_greedy():
  model = loaded()
  lm = harness.harness_model(model)
  text, token = "abc", []
  for _ in range(3):
    ids = [ByteTokenizer.bos_id, *text.encode(), *token]
    token.append(int(model.model(np.array([ids]))[0, -1].argmax()))
  ids = (ByteTokenizer.bos_id, *text.encode())
  requests = [(("", ""), list(ids), token), (("", ""), list(ids), [token[0], token[1] ^ 1])]
  assert [answer[1] for answer in lm._loglikelihood_tokens(requests)] == [True, False]


@pytest.mark.slow
@pytest.mark.parametrize("carried", [True, pytest.param(False, marks=pytest.mark.exhaustive)])
def test_whole_texts_by_hand(carried, monkeypatch):
  monkeypatch.setattr("dense_jax.runs.tasks._WINDOW", 16)
  model = loaded()
  text = "It was a dark and stormy night, caf\u00e9."
  lm = harness.harness_model(model, carried=carried)
  [answer] = lm.loglikelihood_rolling(instances("loglikelihood_rolling", (text,)))
  ids, bos = list(text.encode()), [ByteTokenizer.bos_id]
  if carried:
    expected = by_hand(model.model, bos, ids)[0]
  else:
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    windows = map(make_disjoint_window, get_rolling_token_windows(ids, bos[0], 16, 1))
    expected = sum(by_hand(model.model, list(a), list(b))[0] for a, b in windows)
  assert answer == pytest.approx(expected, abs=1e-3)


@pytest.mark.slow
def test_generation_ends_at_the_first_stop_string():
  model = loaded()
  lm = harness.harness_model(model)
  plain = {"until": [], "max_gen_toks": 40}
  [whole] = lm.generate_until(instances("generate_until", ("ab", plain)))
  assert len(whole) > 10
  stop = whole[5:7]
  options = {"until": [stop, "never there"], "max_gen_toks": 40, "temperature": 0.0}
  sampled = {"until": [], "max_gen_toks": 9, "do_sample": True, "temperature": 2.0, "top_k": 5}
  texts = lm.generate_until(instances(
      "generate_until", ("ab", options), ("ab", plain), ("ab", sampled), ("ab", sampled)
  ))
  assert texts[0] == whole[: whole.index(stop)] and texts[1] == whole
  assert texts[2] != texts[3]
  with pytest.raises(InputError, match=r"generation_kwargs = \{'num_beams': 3\} is not valid"):
    lm.generate_until(instances("generate_until", ("ab", {"until": ["x"], "num_beams": 3})))


@pytest.mark.exhaustive
def test_the_harness_knows_our_models_by_name(tmp_path):
  import lm_eval

  model = loaded().model
  save_hf(model, str(tmp_path / "model"), files=converted_files(ByteTokenizer()))
  task = {
      "task": "counting", "dataset_path": "json", "test_split": "test",
      "dataset_kwargs": {"data_files": {"test": str(tmp_path / "data.jsonl")},
                         "cache_dir": str(tmp_path / "cache")},
      "output_type": "generate_until", "doc_to_text": "{{q}}", "doc_to_target": "{{a}}",
      "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8},
      "metric_list": [{"metric": "exact_match"}],
  }
  (tmp_path / "data.jsonl").write_text(json.dumps({"q": "1 2", "a": "3"}) + "\n")
  (tmp_path / "tasks").mkdir()
  (tmp_path / "tasks" / "counting.yaml").write_text(json.dumps(task))
  harness.register()
  lm = lm_eval.api.registry.get_model("dense_jax").create_from_arg_string(
      f"hf={tmp_path / 'model'}", {"batch_size": 4, "device": None, "max_batch_size": None})
  assert lm.answers.likelihood.batch_size == 4
  results = harness.run_harness(lm, ["counting"], include_path=str(tmp_path / "tasks"))
  assert results["results"]["counting"]["exact_match,none"] in (0.0, 1.0)
  assert results["n-shot"]["counting"] == 0
  elsewhere = task | {"task": "elsewhere", "dataset_path": "nobody/nothing", "dataset_kwargs": {}}
  (tmp_path / "tasks" / "elsewhere.yaml").write_text(json.dumps(elsewhere))
  with pytest.raises(InputError, match=r"--tasks = 'elsewhere' is not valid: .* on this machine"):
    harness.run_harness(lm, ["elsewhere"], include_path=str(tmp_path / "tasks"))
  with pytest.raises(InputError, match=r"one of workdir=\.\.\. and hf=\.\.\."):
    lm_eval.api.registry.get_model("dense_jax").create_from_arg_string("batch_size=4")


@pytest.mark.slow
def test_the_command(tmp_path, capsys):
  task_files.write_all(tmp_path)
  folder, file, items = (str(tmp_path / name) for name in ("model", "out.json", "items.jsonl"))
  save_hf(loaded().model, folder, files=converted_files(ByteTokenizer()))
  command = ["--hf", folder, "--tasks", "lambada,winogrande", "--data", str(tmp_path), "--limit",
             "2", "--shots", "1", "--harness", "--json", file, "--items", items]
  assert evaluate.main(command) == 0
  printed = capsys.readouterr().out
  assert printed.startswith("|") and "|lambada_openai|" in printed.replace(" ", "")
  found = json.loads((tmp_path / "out.json").read_text())
  assert found["lm_eval"] == "0.4.13" and found["model"] == folder
  tasks = found["tasks"]
  assert (tasks["winogrande"]["documents"], tasks["winogrande"]["shots"]) == (2, 1)
  assert tasks["lambada_openai"].keys() == {
      "version", "shots", "documents", "acc", "acc_stderr", "perplexity", "perplexity_stderr"}
  lines = [json.loads(line) for line in (tmp_path / "items.jsonl").read_text().splitlines()]
  assert [line["task"] for line in lines] == ["lambada_openai"] * 2 + ["winogrande"] * 2
  assert lines[0]["perplexity"] == lines[0]["resps"][0][0][0] < 0


@pytest.mark.slow
@pytest.mark.parametrize(("changed", "message"), [
    ({"--tasks": "piqa,nothing"}, r"--tasks = 'piqa,nothing' is not valid: expected some of arc"),
    ({"--tasks": ","}, r"--tasks = ',' is not valid"),
    ({"--data": None}, r"--data = None is not valid"),
    ({"--data": "/nowhere"}, r"--data = '/nowhere' is not valid"),
    ({"--tasks": "lambada"}, r"lambada_openai_test\.jsonl"),
    ({"--include-path": "/nowhere"}, r"--include-path = '/nowhere' is not valid"),
    ({"--harness": None, "--include-path": "x"}, r"--include-path = 'x' is not valid"),
    ({"--tasks": None}, r"without --tasks"),
])
def test_what_the_command_refuses_before_it_loads_a_model(tmp_path, changed, message):
  (tmp_path / "piqa_valid.jsonl").write_text('{"goal": "x"}\n')
  values = {"--hf": "/nowhere", "--tasks": "piqa", "--data": str(tmp_path), "--harness": ""}
  arguments = []
  for name, value in (values | changed).items():
    arguments += [] if value is None else [name] if name == "--harness" else [name, value]
  with pytest.raises(InputError, match=message):
    evaluate.main(arguments)


@pytest.mark.slow
def test_a_malformed_line_is_named(tmp_path):
  (tmp_path / "piqa_valid.jsonl").write_text('{"goal": "x"}\n')
  with pytest.raises(InputError, match=r"piqa_valid\.jsonl, line 1 is not valid"):
    harness.run_harness(harness.harness_model(loaded()), ["piqa"], data=str(tmp_path))

"""`generate` from files of prompts and of states, and in a conversation."""

import json
import signal
import sys

import pytest
from flax import nnx

from dense_jax import experiment, runs
from dense_jax.cli import generate
from dense_jax.data.tokenizer import ByteTokenizer
from dense_jax.errors import InputError
from dense_jax.generation.generator import Generator
from dense_jax.generation.requests import Request
from dense_jax.generation.sampling import Sampling
from dense_jax.interrupt import Break, Interrupt, Stopped
from dense_jax.models.language_model import LanguageModel
from dense_jax.models.params import get_params
from dense_jax.runs import generating

MODEL = ["--workdir", "run"]
PROMPTS = [
    {"prompt": "line é", "id": {"any": 1}, "max_new_tokens": 5, "seed": 3, "temperature": 1.5},
    {"prompt": "", "top_k": 2, "id": "b"},
    {"prompt": "x" * 100, "top_p": 0.5, "min_p": 0.01, "repetition_penalty": 2, "stop": ["\n"]},
    {"prompt": "line é", "temperature": 0, "stop": "never there"},
]


def _model(seed=0):
  config = experiment.load("experiments/smoke.py:debug", [
      ("model.vocab_size", "258"), ("model.width", "16"), ("model.layers", "2"),
  ])
  model = LanguageModel(config.model, rngs=nnx.Rngs(seed))
  return runs.Run(f"run {seed}", ByteTokenizer(), model, get_params(model), config, 4)


@pytest.fixture(scope="module")
def run():
  """Returns a run whose programs are compiled once: all commands of these tests share them."""
  return _model()


@pytest.fixture(autouse=True)
def _shared(run, monkeypatch):
  """Restores that run, and decodes with the programs of one generator for each batch size."""
  monkeypatch.setattr(runs, "restore", lambda workdir, which, weights, strict: run)
  made = _GENERATORS

  def generator(model, tokenizer, *, batch_size):
    if model is not run.model:
      return Generator(model, tokenizer, batch_size=batch_size)
    return made.setdefault(batch_size, Generator(model, tokenizer, batch_size=batch_size))

  monkeypatch.setattr(generate, "Generator", generator)


_GENERATORS = {}
CONVERSE = [*MODEL, "--interactive", "--batch-size", "8"]


def _write(path, lines):
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  return str(path)


def _read(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_prompts_of_a_file_are_continued_in_order_each_by_its_own_settings(run, tmp_path, capsys):
  prompts = _write(tmp_path / "in.jsonl", PROMPTS)
  output = tmp_path / "deep" / "out.jsonl"
  arguments = [*MODEL, "--max-new-tokens", "9", "--seed", "2", "--log-probs"]
  assert generate.main([*arguments, "--prompts", prompts, "--output", str(output)]) == 0
  assert capsys.readouterr().out == ""
  assert [file.name for file in output.parent.iterdir()] == ["out.jsonl"]
  lines = _read(output)
  samplings = [
      Sampling(1.5), Sampling(0.8, top_k=2),
      Sampling(0.8, top_p=0.5, min_p=0.01, repetition_penalty=2), Sampling(0),
  ]
  for line, prompt, sampling in zip(lines, PROMPTS, samplings, strict=True):
    request = Request(
        [256, *prompt["prompt"].encode()], sampling, prompt.get("max_new_tokens", 9),
        prompt.get("seed", 2), (257,), tuple(prompt.get("stop", ())),
    )
    (result,) = _GENERATORS[8]([request])
    expected = {key: prompt[key] for key in ("id", "prompt") if key in prompt} | {
        "text": result.text, "reason": result.reason, "tokens": len(result.ids),
        "ids": result.ids, "log_probs": result.log_probs,
    }
    assert line == expected
  # Printed, they are the same; so are those of the command line.
  assert generate.main([*arguments, "--prompts", prompts]) == 0
  assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == lines
  assert generate.main([*MODEL, "--prompt", "line é", "--output", str(output)]) == 0
  assert [set(line) for line in _read(output)] == [{"prompt", "text", "reason", "tokens"}]


@pytest.mark.parametrize(("line", "message"), [
    ("text", "line 2 of .*Expecting value"), ("[1]", 'line 2 of .*expected an object with the key'),
    ("{}", 'line 2 of .*"prompt"'), ('{"prompt": 5}', "line 2 of .*prompt = 5 .*str"),
    ('{"prompt": "a", "seeed": 5}', "line 2 of .*unknown key 'seeed'.*seed"),
    ('{"prompt": "a", "seed": -1}', "line 2 of .*seed = -1"),
    ('{"prompt": "a", "seed": true}', "line 2 of .*seed = True"),
    ('{"prompt": "a", "top_k": 1.5}', "line 2 of .*top_k = 1.5"),
    ('{"prompt": "a", "temperature": -1}', "line 2 of .*temperature = -1"),
    ('{"prompt": "a", "max_new_tokens": 10000000}', "line 2 of .*max_new_tokens = 10000000"),
    ('{"prompt": "a", "stop": ""}', "line 2 of .*stop"),
    ('{"prompt": "a", "stop": [1]}', "line 2 of .*stop"),
    (r'{"prompt": "\ud800"}', "line 2 of .*UTF-8"), (b'{"prompt": "\xff"}', "line 2 of .*utf-8"),
])
def test_a_bad_line_is_named_before_the_model_is_loaded(monkeypatch, tmp_path, line, message):
  monkeypatch.setattr(runs, "restore", None)
  content = line if isinstance(line, bytes) else line.encode()
  (tmp_path / "in").write_bytes(b'{"prompt": "good"}\n' + content + b"\n")
  with pytest.raises(InputError, match=message):
    generate.main([*MODEL, "--prompts", str(tmp_path / "in")])


def test_a_file_of_continuations_goes_on_where_it_was_stopped(monkeypatch, tmp_path):
  prompts = _write(tmp_path / "in.jsonl", PROMPTS)
  output = tmp_path / "out.jsonl"
  arguments = [*MODEL, "--prompts", prompts, "--output", str(output), "--max-new-tokens", "4"]
  assert generate.main(arguments) == 0
  whole = output.read_bytes()
  output.unlink()
  continued = []

  def interrupted(*args, **options):
    for number, one in enumerate(_continue(*args, **options)):
      if number == 2:
        raise Stopped
      yield one

  def counted(*args, **options):
    continued.extend(one for one in _continue(*args, **options))
    return iter(continued)

  _continue = generating.continue_prompts
  monkeypatch.setattr(generating, "continue_prompts", interrupted)
  with pytest.raises(Stopped):
    generate.main(arguments)
  assert not output.exists()
  partial = tmp_path / "out.jsonl.partial"
  partial.write_bytes(partial.read_bytes() + b'gar\0bled\n[9]\n[3, {"cut')
  monkeypatch.setattr(generating, "continue_prompts", counted)
  assert generate.main(arguments) == 0
  assert len(continued) == 2 and output.read_bytes() == whole
  # Another job does not go on with it.
  partial.write_text('{"job": "another"}\n[0, {"text": "wrong"}]\n')
  assert generate.main(arguments) == 0
  assert output.read_bytes() == whole and not partial.exists()


def test_a_text_goes_on_from_a_saved_state(tmp_path, capsys):
  def printed(*more):
    assert generate.main([*MODEL, "--seed", "4", "--temperature", "2", *more]) == 0
    return capsys.readouterr().out.removesuffix("\n")

  state = str(tmp_path / "deep" / "state")
  whole = printed("--prompt", "line é", "--max-new-tokens", "30")
  first = printed("--prompt", "line é", "--max-new-tokens", "11", "--save-state", state)
  rest = printed("--from-state", state, "--max-new-tokens", "19")
  assert "line é" in whole
  # Where the state ends, an unfinished character was printed as U+FFFD.
  assert _without_replacement(first + rest) == _without_replacement(whole)
  # A state of a text alone, on which several prompts go on.
  printed("--prompt", "once ", "--max-new-tokens", "0", "--save-state", state)
  assert printed("--from-state", state, "--prompt", "upon", "--prompt", "more").count("-" * 72) == 2
  with pytest.raises(InputError, match="--save-state"):
    generate.main([*MODEL, "--prompt", "a", "--prompt", "b", "--save-state", state])


def _without_replacement(text):
  return text.replace("\ufffd", "")


def test_another_models_state_is_refused(tmp_path, monkeypatch):
  state = str(tmp_path / "state")
  reads = ["--prompt", "a", "--max-new-tokens", "0", "--save-state", state]
  assert generate.main([*MODEL, *reads]) == 0
  monkeypatch.setattr(runs, "restore", lambda workdir, which, weights, strict: _model(seed=1))
  with pytest.raises(InputError, match=r"--from-state = .*a state of run 1; it is one of run 0"):
    generate.main([*MODEL, "--from-state", state])


def test_the_dtype_of_states_and_the_rows(run, monkeypatch):
  made = []

  def generator(model, tokenizer, *, batch_size):
    made.append((model.config.state_dtype, batch_size))
    raise Stopped

  monkeypatch.setattr(generate, "Generator", generator)
  for more in (["--prompt", "a"], ["--interactive"], ["--interactive", "--batch-size", "3"],
               ["--prompt", "a", "--state-dtype", "bfloat16"]):
    with pytest.raises(Stopped):
      generate.main([*MODEL, *more])
  assert made == [("float32", 8), ("float32", 1), ("float32", 3), ("bfloat16", 8)]
  changed = generating.with_state_dtype(run, "bfloat16")
  assert get_params(changed.model).keys() == run.params.keys()


def _types(monkeypatch, *lines):
  """Types lines, functions that raise among them, and then the end of the input."""
  waiting = iter(lines)

  def typed(mark):
    line = next(waiting, None)
    if line is None:
      raise EOFError
    return line() if callable(line) else line

  monkeypatch.setattr("builtins.input", typed)


def test_a_conversation_keeps_its_state(monkeypatch, tmp_path, capsys):
  state = str(tmp_path / "state")
  _types(monkeypatch, "once", "", lambda: signal.raise_signal(signal.SIGINT), " upon")
  arguments = [*CONVERSE, "--max-new-tokens", "5", "--seed", "6"]
  assert generate.main([*arguments, "--save-state", state]) == 0
  printed = capsys.readouterr().out
  generator, prefix, expected = _GENERATORS[8], None, []
  for text in ("once", "", " upon"):
    ids = [*([] if prefix else [256]), *text.encode()]
    (result,) = generator([
        Request(ids, Sampling(0.8), 5, 6, (257,), prefix=prefix, keep_state=True)
    ])
    prefix = result.prefix
    expected.append(generate.printable(result.text) + "\n")
  assert printed == "".join(expected[:2]) + "\n(Ctrl-D ends)\n" + expected[2]
  # It goes on from the state.
  _types(monkeypatch, "a")
  assert generate.main([*arguments, "--from-state", state]) == 0
  (result,) = generator([Request([97], Sampling(0.8), 5, 6, (257,), prefix=prefix)])
  assert capsys.readouterr().out == generate.printable(result.text) + "\n"
  # Nothing is typed: there is no state.
  _types(monkeypatch)
  with pytest.raises(InputError, match="--save-state"):
    generate.main([*arguments, "--save-state", state])


def test_ctrl_c_ends_an_answer_not_the_conversation(monkeypatch, capsys):
  """The signal comes after the first piece of the first answer."""
  _types(monkeypatch, "once", "upon")
  write, pieces = sys.stdout.write, []

  def interrupting(text):
    pieces.append(text)
    if len(pieces) == 1:
      signal.raise_signal(signal.SIGINT)
    return write(text)

  monkeypatch.setattr(sys.stdout, "write", interrupting)
  arguments = [*CONVERSE, "--max-new-tokens", "40", "--temperature", "0"]
  with Interrupt():
    assert generate.main(arguments) == 0
  first, *_ = _GENERATORS[8]([Request([256, *b"once"], Sampling(0), 40, 0, (257,))])
  shown = "".join(pieces)
  assert len(first.ids) > 8 and generate.printable(first.text) not in shown
  assert shown.startswith(generate.printable(first.text[:2]))


def test_a_break_leaves_the_process_to_other_signals():
  with Interrupt() as interrupt:
    with Break() as ctrl_c:
      signal.raise_signal(signal.SIGINT)
      assert ctrl_c.asked and not interrupt.requested
      ctrl_c.raises = True
      with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
      with pytest.raises(Stopped, match="SIGTERM"):
        signal.raise_signal(signal.SIGTERM)
    assert interrupt.requested == "SIGTERM"
    interrupt.wait = interrupt.requested = ""


@pytest.mark.parametrize(("arguments", "message"), [
    ([], "no text: expected --prompt"), (["--interactive", "--output", "x"], "--output"),
    (["--prompt", "a", "--log-probs"], "--log-probs needs"),
    (["--prompt", "a", "--batch-size", "0"], "--batch-size = 0"),
    (["--prompt", "a", "--stop", ""], "stop = ''"), (["--prompt", "a", "--min-p", "2"], "min_p"),
    (["--prompts", "no such file"], "--prompts = 'no such file'"),
    (["--prompt", "a", "--output", "/proc/x"], "--output"),
    (["--prompt", "a", "--save-state", "/proc/x"], "--save-state"),
    (["--prompt", "a", "--output", "x", "--save-state", "y"], "--save-state"),
    (["--from-state", "no such file"], "--from-state = 'no such file'"),
])
def test_arguments_that_do_not_go_together_are_named(arguments, message, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(InputError, match=message):
    generate.main([*MODEL, *arguments])

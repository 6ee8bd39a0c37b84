"""A rival in another process: the protocol, its failures, and whose turn it is."""

import stat
import sys
import time

import pytest

from dense_jax.errors import InputError
from experiments.benchmarks import common, cpu, cpu_rivals, torch_client, worker
from experiments.benchmarks.torch_client import MODELLING_FILE, SCRIPT, Rivals, TorchRival
from tests.builders import model_config, random_model

# Answers as torch_rival.py does, without torch, and writes down what it does when.
STAND_IN = """
import json, os, sys, time

def answer(request):
    do = request.pop("do")
    if do == "load":
        assert os.path.isfile(os.path.join(request["folder"], "model.safetensors"))
        assert "PYTHONPATH" not in os.environ
        return {"parameters": 7, "threads": 2, "versions": {}}
    return {"loss": 2.5} if do == "batch" else {"seconds": 3.0}

for line in sys.stdin:
    request = json.loads(line)
    with open(LOG, "a") as log:
        print("begins", request["do"], file=log, flush=True)
        time.sleep(0.01)
        said = answer(request)
        print("ends", file=log)
    print(json.dumps(said), flush=True)
"""
# Loads a model, and then fails in some way.
FAILING = """
import json, os, sys, time
sys.stdin.readline()
print(json.dumps({"parameters": 7}), flush=True)
"""


@pytest.fixture(scope="module")
def model():
  return random_model(model_config("mamba"))


@pytest.fixture
def rivals(tmp_path):
  """Makes a rival whose program is this text."""
  def make(text, authors=""):
    script = tmp_path / "stand_in.py"
    script.write_text(text.replace("LOG", repr(str(tmp_path / "log"))))
    return Rivals(authors, sys.executable, script)

  return make


def test_each_waits_while_the_other_computes(model, rivals, tmp_path):
  def ours():
    with open(tmp_path / "log", "a") as log:
      print("ours begins", file=log, flush=True)
      time.sleep(0.01)
      print("ours ends", file=log)
    return 2.0

  with TorchRival(rivals(STAND_IN), model, code="") as rival:
    assert (rival.parameters, rival.facts) == (7, {"threads": 2, "versions": {}})
    rival.trains_on([[1, 2, 3]], 2.5004)
    with pytest.raises(AssertionError, match=r"loss is 2\.500000 nats, and ours 2\.502"):
      rival.trains_on([[1, 2, 3]], 2.502)
    times = common.compare(ours, rival.train, 2)
    assert rival.decode([[1, 2]], 4) == 3.0
  assert (times.first, times.second, times.ratio) == (2.0, 3.0, 1.5)
  log = (tmp_path / "log").read_text().splitlines()
  assert log == [
      "begins load", "ends", *["begins batch", "ends"] * 2,
      *["ours begins", "ours ends", "begins train", "ends"] * 3, "begins decode", "ends",
  ]


@pytest.mark.parametrize(("fails", "message"), [
    ("", "the process ended, see above"),
    ("sys.exit(3)", "the process ended, see above"),
    ("os.kill(os.getpid(), 9)", "the process ended, see above"),
    ("print(json.dumps({'error': 'KeyError: 3'}))", "KeyError: 3 "),
    ("print('Loading weights')", "a JSON object with the number 'seconds', and it answered 'Load"),
    ("print('3')", "it answered '3"),
    ("print('[]')", "it answered"),
    ("print('{}')", "it answered '{}"),
    ("print(json.dumps({'loss': 2.0}))", "it answered"),
    ("print(json.dumps({'seconds': 'two'}))", "it answered"),
    ("sys.stdout.buffer.write(bytes([255, 254, 10]))", "it answered"),
])
def test_a_rival_that_fails_is_an_error_that_says_how(model, rivals, fails, message):
  rival = TorchRival(rivals(FAILING + "sys.stdin.readline()\n" + fails), model, code="")
  with pytest.raises(InputError, match=rf"stand_in\.py cannot train: .*{message}") as error:
    rival.train()
  assert "(it needs --rival-python PYTHON, one with: pip install torch" in str(error.value)
  with pytest.raises(ValueError, match="closed"):  # Its process has ended.
    rival.train()


def test_a_rival_that_does_not_end_is_killed(model, rivals, monkeypatch):
  monkeypatch.setattr(worker, "_END_SECONDS", 0.1)
  start = time.monotonic()
  with TorchRival(rivals(FAILING + "time.sleep(600)"), model, code=""):
    pass
  assert time.monotonic() - start < 60


def test_a_python_that_is_missing_is_named(model, tmp_path):
  for python in (str(tmp_path / "python"), str(tmp_path)):
    with pytest.raises(InputError, match=rf"--rival-python {python} cannot be started: "):
      TorchRival(Rivals("", python), model, code="")


def test_a_python_without_torch_is_told_what_to_install(model, tmp_path):
  python = tmp_path / "python"
  python.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')  # -S: no installed packages.
  python.chmod(python.stat().st_mode | stat.S_IXUSR)
  message = rf"{SCRIPT.name} cannot load: ModuleNotFoundError: No module named 'torch' \(it needs"
  with pytest.raises(InputError, match=message):
    TorchRival(Rivals("", str(python)), model, code="")


@pytest.mark.parametrize(("arguments", "message"), [
    (("--authors", "FOLDER/none", "--rival-python", "PYTHON"), f"a folder with {MODELLING_FILE}"),
    (("--authors", "FOLDER", "--rival-python", "PYTHON"), f"a folder with {MODELLING_FILE}"),
    (("--rival-python", "FOLDER/none", "--quick", "--only", "transformers"),
     "--rival-python = 'FOLDER/none' is not valid: expected a Python that can be run"),
])
def test_a_wrong_path_is_said_before_anything_is_timed(
    tmp_path, capsys, monkeypatch, arguments, message
):
  monkeypatch.setattr(cpu_rivals, "TrainStep", lambda *_: pytest.fail("it began to time"))
  places = {"FOLDER": str(tmp_path), "PYTHON": sys.executable}
  for name, place in places.items():
    arguments = [argument.replace(name, place) for argument in arguments]
    message = message.replace(name, place)
  with pytest.raises(SystemExit):
    cpu.main(arguments)
  assert message in capsys.readouterr().err


@pytest.mark.exhaustive
def test_tables_beside_rivals(rivals, tmp_path, monkeypatch):
  (tmp_path / MODELLING_FILE).write_text("# The authors' code.\n")
  monkeypatch.setattr(torch_client, "AGREEMENT", float("inf"))  # It knows no loss.
  monkeypatch.setattr(cpu_rivals, "HF_FAMILIES", ("mamba2",))
  beside = rivals(STAND_IN, str(tmp_path))
  training, decoding = cpu_rivals.authors(True, beside)
  assert training.results["train 256"]["pytorch"] == 256 / 3
  assert decoding.results["decode 1"]["over_pytorch"] > 0
  (table,) = cpu_rivals.transformers(True, beside)
  assert list(table.results) == ["mamba2, train, T 32", "mamba2, decode, B 1"]
  assert all(figures["pytorch"] > 0 for figures in table.results.values())
  without = Rivals("", "")
  assert not list(cpu_rivals.transformers(True, without))

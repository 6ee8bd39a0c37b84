"""Compiling for TPUs and GPUs without any, as a user meets it."""

import json
import os
import subprocess
import sys

import jax
import pytest

from dense_jax.cli import compile
from dense_jax.errors import InputError
from dense_jax.runs import compile as programs
from dense_jax.runs import compile_targets as targets
from tests.helpers import ROOT, gpu_compiler_python, tpu_compiler_environment

SMOKE = ["--config", "experiments/smoke.py:debug"]


def run(*arguments, needs=tpu_compiler_environment):
  """Runs the command line in a process of its own that knows nothing of TPUs and GPUs.

  `needs` skips the test where there is no compiler.
  """
  needs()
  environment = {
      name: value for name, value in os.environ.items() if not name.startswith(("TPU_", "XLA_"))
  }
  result = subprocess.run(
      [sys.executable, "-m", "dense_jax.cli.compile", *map(str, arguments)],
      cwd=ROOT, env=environment | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
      timeout=600, check=False,
  )
  return result.returncode, result.stdout, result.stderr


@pytest.mark.parametrize("mesh", ["model=4", "data", "data=x", "data=4;fsdp=2", "data=4,,fsdp=1"])
def test_a_mesh_that_is_not_understood_names_the_axes(mesh, monkeypatch):
  monkeypatch.setattr(targets, "topology_devices", lambda _: jax.devices()[:4])
  with pytest.raises(InputError, match=r"--mesh = .* axes slices, data, fsdp, sequence, tensor"):
    compile.main([*SMOKE, "--topology", "v5e:2x2", "--mesh", mesh])


def test_bad_input_is_told_before_anything_is_compiled(monkeypatch):
  monkeypatch.setattr(targets, "topology_devices", lambda _: jax.devices()[:8])
  for arguments, message in [
      (["--mesh", "data=3"], "config.mesh = .*product is 8"),
      (["--config.train.batch_size=12"], "config.train.batch_size = 12 .* multiple of .* = 8"),
      (["--program", "decode", "--config.train.batch_size=4"], "a multiple of .* = 8"),
      (["--mesh", "tensor=8", "--config.model.width=36"], "config.mesh.tensor = 8"),
      (["--config.data.tokenizer=some.model"], "config.model.vocab_size = 0 .* some.model"),
      (["--config.model.widht=3"], "unknown key config.model.widht"),
  ]:
    with pytest.raises(InputError, match=message):
      compile.main([*SMOKE, "--topology", "v5e:2x4", *arguments])


@pytest.mark.parametrize("file", ["", ".", "/proc/new.json", "setup.cfg/", "README.md/x.json"])
def test_a_file_that_cannot_be_written_is_told_before_anything_is_compiled(monkeypatch, file):
  monkeypatch.setattr(targets, "topology_devices", lambda _: jax.devices()[:4])
  monkeypatch.setattr(programs, "compile_program", None)
  monkeypatch.chdir(ROOT)
  with pytest.raises(InputError, match=f"^--json = '{file}' is not valid: expected a "):
    compile.main([*SMOKE, "--topology", "v5e:2x2", "--json", file])


@pytest.mark.slow
@pytest.mark.tpu_compiler
def test_a_train_step_for_four_chips(tmp_path):
  """Compares the matmuls of the smallest experiment with 6 N FLOPs per token."""
  file = tmp_path / "report.json"
  arguments = *SMOKE, "--topology", "v5e:2x2", "--mesh", "data=2,fsdp=2", "--json", file
  status, out, err = run(*arguments)
  assert status == 0, err
  report = json.loads(file.read_text())
  assert set(report) == {
      "fits", "chips", "compile_seconds", "compile_cpu_seconds", "hbm", "flops", "matmul_flops",
      "transcendentals", "bytes_accessed", "launches", "collectives", "bound", "estimate", "note",
      "program", "topology", "mesh", "versions", "config",
  }
  assert set(report["hbm"]) == {"arguments", "temporaries", "outputs", "peak", "capacity"}
  assert (report["fits"], report["chips"], report["note"]) == (True, 4, "")
  assert 0 < report["hbm"]["arguments"] <= report["hbm"]["peak"] < 16e9
  assert report["mesh"] == {"slices": 1, "data": 2, "fsdp": 2, "sequence": 1, "tensor": 1}
  kinds = {collective["kind"] for collective in report["collectives"]}
  assert {"all-gather", "all-reduce"} <= kinds
  assert all(c["count"] > 0 and c["bytes"] > 0 for c in report["collectives"])
  assert "fits" in out.splitlines()[-1] and "compiling" in err

  # 30,720 parameters are in matmuls; a chip has one row of 64 tokens. The head's 258 x 32 are
  # multiplied once more, for a chunk's logits are computed again for its gradients.
  file.unlink()
  status, _, err = run(*arguments, "--config.model.implementation=associative")
  assert status == 0, err
  matmul_flops = json.loads(file.read_text())["matmul_flops"]
  assert matmul_flops == pytest.approx((6 * 30720 + 2 * 258 * 32) * 64, rel=0.01)
  # Kernels compute low-rank gates and step sizes again instead of reading them.
  assert matmul_flops < report["matmul_flops"] < 2 * matmul_flops


@pytest.mark.slow
@pytest.mark.tpu_compiler
@pytest.mark.parametrize("program", ["eval", "prefill", "decode"])
def test_other_programs_for_one_chip(program, tmp_path):
  file = tmp_path / "report.json"
  status, _, err = run(
      *SMOKE, "--topology", "v5e:1x1", "--program", program, "--json", file,
      "--config.model.family=retnet",
  )
  assert status == 0, err
  report = json.loads(file.read_text())
  assert (report["chips"], report["collectives"], report["program"]) == (1, [], program)
  assert report["matmul_flops"] > 0


@pytest.mark.slow
@pytest.mark.tpu_compiler
def test_what_the_compiler_refuses_does_not_fit(tmp_path):
  """Compiles 16 GB of parameters and moments for one chip."""
  file = tmp_path / "report.json"
  status, out, err = run(
      *SMOKE, "--topology", "v5e:1x1", "--json", file, "--config.model.family=retnet",
      "--config.model.width=16384", "--config.model.layers=2", "--config.model.dense.depth=0",
  )
  assert status == 1, err
  report = json.loads(file.read_text())
  assert not report["fits"] and report["hbm"]["peak"] > report["hbm"]["capacity"]
  assert report["flops"] is None and report["hbm"]["arguments"] is None
  assert "does not fit" in out.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.gpu_compiler
def test_a_train_step_for_four_gpus(tmp_path):
  file = tmp_path / "report.json"
  status, out, err = run(
      *SMOKE, "--topology", "h100:4", "--mesh", "data=2,fsdp=2", "--json", file, "--largest", "3",
      needs=gpu_compiler_python,
  )
  assert status == 0, err
  report = json.loads(file.read_text())
  assert (report["fits"], report["chips"], report["note"]) == (True, 4, "")
  assert 0 < report["hbm"]["arguments"] <= report["hbm"]["peak"] < 80e9
  assert {"all-gather", "all-reduce"} <= {each["kind"] for each in report["collectives"]}
  # See the same for TPUs above. Here a product with few rows or columns may be no matmul; and the
  # kernels pad ranks, which are 2 in a model as small as this, to the 16 that a matmul needs, and
  # compute these products once more in the backward pass: 2 * 64 * 16 * 4 for each, in three layers
  # for the step size, and in two for those of the other layer's states and of their gate.
  padded = 2 * 64 * 16 * 4 * (3 + 2 * 2)
  assert 0.8 * 6 * 30720 * 64 < report["matmul_flops"] < (1.05 * 6 * 30720 + padded) * 64
  assert report["launches"] > 100
  estimate = report["matmul_flops"] / 790e12, report["bytes_accessed"] / 3.0e12
  assert tuple(report["estimate"].values()) == pytest.approx(estimate)
  assert "estimated step" in out and "dense_jax" not in err.lower()
  header = "lines of code that move the most bytes"
  assert ".py:" in out[out.index(header) + len(header) :]


@pytest.mark.slow
@pytest.mark.gpu_compiler
def test_decoding_on_an_h200(tmp_path):
  file = tmp_path / "report.json"
  status, _, err = run(
      *SMOKE, "--topology", "h200:1", "--program", "decode", "--json", file,
      needs=gpu_compiler_python,
  )
  assert status == 0, err
  report = json.loads(file.read_text())
  assert (report["hbm"]["capacity"], report["collectives"]) == (141e9, [])
  assert set(report["versions"]) == {"python", "jax", "jax-cuda13-plugin"}

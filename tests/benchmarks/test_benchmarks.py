"""Every benchmark runs to its end at toy size, and records the origin of its figures."""

import dataclasses
import json
import math
import subprocess
import sys

import jax
import pytest

from dense_jax import sharding
from dense_jax.models.flops import train_flops
from dense_jax.models.params import abstract_model, get_params, logical_axes
from dense_jax.ops.kernel_check import LIMITS
from experiments.benchmarks import (
    cpu,
    cpu_dense,
    gpu,
    gpu_case,
    gpu_tables,
    registers,
    revisions,
    tpu_matrix,
)
from tests.builders import model_config
from tests.helpers import ROOT, TOY_ENVIRONMENT, tpu_compiler_environment

FIELDS = {"date", "hardware", "versions", "command", "note", "results"}


def run(module: str, folder, *arguments: str, environment=TOY_ENVIRONMENT) -> tuple[dict, str]:
  """Runs a benchmark; returns its record and its output."""
  file = folder / "results.json"
  done = subprocess.run(
      [sys.executable, "-m", f"experiments.benchmarks.{module}", *arguments, "--json", file],
      cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False,
  )
  assert done.returncode == 0, done.stderr[-4000:]
  record = json.loads(file.read_text())
  assert record.keys() >= FIELDS
  assert f"python -m experiments.benchmarks.{module} " in record["command"]
  return record, done.stdout


@pytest.mark.exhaustive
def test_cpu(tmp_path):
  record, output = run("cpu", tmp_path, "--quick")
  results = record["results"]
  # Beside transformers only where torch is installed.
  assert set(results) - {"transformers"} == {"authors", *cpu.PARTS}
  assert set(cpu.PARTS) == {"lengths", "modes", "dense", "decode", "bandwidth", "constant"}
  assert all(figures["gigabytes_per_second"] > 0 for figures in results["bandwidth"].values())
  assert all(figures["difference"] < 1e-3 for figures in results["modes"].values())
  assert results["constant"]["mamba2"]["ratio"] > 0
  decoded = results["dense"]["decode mamba2 state, m = 2 B 6"]
  assert decoded["by_bytes"] == pytest.approx(decoded["dense_bytes"] / decoded["base_bytes"])
  assert "| mamba2 | state, m = 2 |" in output


@pytest.mark.exhaustive
def test_revisions(tmp_path):
  record, output = run("revisions", tmp_path, "--before", "HEAD", "--quick")
  assert [name.partition(":")[0] for name in record["results"]] == list(revisions.PARTS)
  assert all(figures["ratio"] > 0 < figures["tokens_per_second"]
             for figures in record["results"].values())
  assert f"before: {record['before']}" in output and len(record["before"]) == 40


def test_cases_beside_an_older_revision_have_names_of_their_own():
  for part in revisions.PARTS:
    names = [case.name for case in revisions.cases(part)]
    assert len(names) == len(set(names)) >= 4


def test_a_revision_that_is_not_there_is_named(capsys):
  with pytest.raises(SystemExit):
    revisions.main(["--before", "no-such-revision"])
  assert "--before 'no-such-revision' is not valid: expected a revision" in capsys.readouterr().err


@pytest.mark.exhaustive
def test_seeds(tmp_path):
  record, output = run("seeds", tmp_path, "--quick")
  assert set(record["results"]) == {
      f"{model}, {count} seeds" for model in ("gau_retnet", "mamba2") for count in (2, 3)}
  assert all(figures["ratio"] > 0 for figures in record["results"].values())
  assert record["hardware"].startswith("1 cores")
  assert "| gau_retnet | 3 seeds |" in output


@pytest.mark.exhaustive
def test_dense_overhead(tmp_path):
  record, _ = run("dense_overhead", tmp_path, "--quick", "--family", "mamba2")
  assert record["results"]["families"]["mamba2"]["added"] > 0
  assert set(record["results"]["options"]) == {"inject=inputs"}


@pytest.mark.exhaustive
def test_compile_time(tmp_path):
  record, _ = run("compile_time", tmp_path, "--quick")
  figures = record["results"]["mamba2 base"]
  assert figures["ratio"] > 0 and figures["trace 8"] > 0 and figures["compile 4"] > 0
  assert figures["cpu_ratio"] == figures["cpu 8"] / figures["cpu 4"]


@pytest.mark.exhaustive
def test_gpu_in_two_parts(tmp_path):
  first = ("--toy", "--only", "train/mamba2/base", "rival/mamba2")
  record, output = run("gpu", tmp_path, *first)
  assert set(record["results"]) == {"train/mamba2/base/T64", "rival/mamba2/base/T64"}
  trained = record["results"]["train/mamba2/base/T64"]
  assert trained["tokens_per_second"] > 0 and trained["mfu"] is None
  assert "rival/mamba2/base/T64: skipped: " in output

  record, output = run(
      "gpu", tmp_path, "--toy", "--only", "train/mamba2/base", "train/gau_retnet-1.3B/inputs-1",
      "mode/mamba2", "decode/mamba2/base", "context/mamba2/base",
  )
  assert record["results"]["train/mamba2/base/T64"] == trained, "done cases are not done again"
  for form in ("pallas", "triton"):
    kernels = record["results"].pop(f"mode/mamba2/{form}/T64")
    assert kernels["skipped"] == f"runs as {form} (interpreted) here"
  assert len(record["results"]) == 8
  assert not any("failed" in figures for figures in record["results"].values()), output
  for heading in ("Training", "Implementations", "Decoding", "A step of decoding"):
    assert f"\n{heading}" in output


@pytest.mark.exhaustive
def test_the_short_plan_on_a_gpu(tmp_path):
  """Rehearses what is new in it; training and decoding are the cases of the full plan."""
  record, output = run(
      "gpu", tmp_path, "--plan", "short", "--toy", "--side-by-side", "2", "--only", "check/mamba2",
      "rates", "layer/mamba2", "layer/mamba/state-2", "train/retnet/base", "rival/retnet",
      "operation",
  )
  results = record["results"]
  assert "skipped" in results.pop("operation/ssd/mamba_ssm/T2048")
  assert "skipped" in results.pop("operation/scan/mamba_ssm/T2048")
  assert "skipped" in results.pop("rival/retnet/base/T64")
  assert results["train/retnet/base/T64"]["tokens_per_second"] > 0
  assert "compiled after " in output
  assert not any(figures.keys() & {"failed", "skipped"} for figures in results.values()), output
  errors = results["check/mamba2/kernels/small"]["errors"]["chunked"]
  assert 0 < max(errors.values()) < LIMITS["bfloat16"]
  assert results["layer/mamba2/state-2/T2048"]["seconds"] > 0
  assert results["rates/card/all/large"]["copied_bytes_per_second"] > 0
  for heading in ("Errors of kernels", "Rates of one", "A layer's recurrence", "Operations"):
    assert f"\n{heading}" in output


def test_the_short_plan_begins_with_the_kernels():
  for plan in gpu.PLANS["short"]:
    names = list(gpu.cases(plan))
    assert len(names) == len(set(names))
    kinds = list(dict.fromkeys(name.split("/")[0] for name in names))
    assert kinds == ["check", "rates", "layer", "train", "decode", "rival", "operation"]
  assert "decode/mamba2/state-2/B64" in gpu.cases(gpu.PLANS["short"][0])


def test_measured_steps_beside_their_estimates():
  measured = {"tokens_per_second": 32768 / 0.66, "device": "NVIDIA H100 80GB HBM3"}
  results = {"train/mamba2/state-2/T2048": measured, "train/mamba2/base/T8192": measured,
             "train/mamba2/base/T2048": {"failed": "no memory"}}
  reports = {"h100 | mamba2 | state m=2": {
      "estimate": {"matmuls": 0.1, "memory": 0.5}, "launches": 2000,
      "config": {"train": {"batch_size": 16}, "data": {"seq_len": 2048}},
  }}
  assert gpu_tables.estimates(results, reports).rows[1:] == [
      ["mamba2", "state-2", "660", "600", "1.10", "2,000"]
  ]
  assert gpu_tables.estimates(results, {}).rows[1:] == []


def test_gpu_goes_on_after_a_failure_and_stops_at_its_budget(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(gpu, "run", lambda *_: {"failed": "no such form"})
  file = tmp_path / "results.json"
  gpu.main(["--only", "mode/mamba2", "--json", str(file)])
  names = set(json.loads(file.read_text())["results"])
  assert {"mode/mamba2/chunked/T8192", "mode/mamba2/associative/T8192"} <= names
  assert "mode/mamba2/chunked/T8192: failed: no such form" in capsys.readouterr().out
  gpu.main(["--only", "mode/mamba/", "--json", str(file), "--budget-seconds", "-1"])
  assert set(json.loads(file.read_text())["results"]) == names
  assert "the budget is spent before mode/mamba/" in capsys.readouterr().out


def test_results_of_other_hardware_are_not_added_to(tmp_path):
  file = tmp_path / "results.json"
  file.write_text(json.dumps({"hardware": "another", "results": {}}))
  with pytest.raises(SystemExit, match="other hardware, another"):
    gpu.main(["--only", "mode", "--json", str(file)])
  gpu.main(["--tables", "--json", str(file)])


def test_gpu_cases_begin_with_what_matters_most():
  names = list(gpu.cases(gpu.FULL))
  assert len(names) == len(set(names))
  assert names[0] == "train/gau_retnet/base/T2048"
  assert names.index("rival/mamba2/base/T2048") < names.index("decode/mamba2/base/B1")
  assert names.index("train/mamba2/base/T2048") < names.index("train/gau_retnet-1.3B/base/T2048")


def test_utilization():
  config = model_config("mamba", layers=3)
  rate = 989e12 / train_flops(config, 64)
  assert gpu_case.utilization(config, 64, 0.5 * rate, "NVIDIA H200") == pytest.approx(0.5)
  assert gpu_case.utilization(config, 64, rate, "cpu") is None


def test_bytes_of_a_decoding_step():
  """The model is gau_retnet: 3 layers, each with 2 heads of P 16 and N 4, so 128 numbers."""
  base = model_config("gau_retnet", layers=3, heads=2, key_dim=8)
  moved = cpu_dense.step_bytes(base, batch_size=5)
  state = 5 * 3 * 2 * 16 * 4 * 4
  assert moved.states == state and moved.shallow == 0
  assert moved.total() == moved.weights + 2 * state

  dense = model_config("gau_retnet", depth=2, layers=3, heads=2, key_dim=8)
  with_reads = cpu_dense.step_bytes(dense, batch_size=5)
  # Layer 1 reads one state and layer 2 two: together as many as the three layers have.
  assert with_reads.states == state and with_reads.shallow == state
  assert with_reads.weights > moved.weights
  inputs = model_config("gau_retnet", depth=2, inject="inputs", layers=3, heads=2, key_dim=8)
  assert cpu_dense.step_bytes(inputs, batch_size=5).shallow == 0


@pytest.mark.exhaustive
@pytest.mark.tpu_compiler
def test_a_sample_of_the_tpu_matrix(tmp_path):
  """Compiles a model of a published size with the real compiler, for a slice of 16 chips."""
  name, page = "dense_retnet 350M | v5e:4x4 | fsdp 16 | 64 x 2048", tmp_path / "page.md"
  record, output = run(
      "tpu_matrix", tmp_path, "--only", name, "--markdown", page,
      environment=tpu_compiler_environment(),
  )
  assert list(record["results"]) == [name]
  found = record["results"][name]
  assert found["fits"] and found["hbm"]["peak"] < found["hbm"]["capacity"] == 16e9
  assert 0 < found["mfu_ceiling"] <= 1
  # All-gathers of parameters, which are split in 16, and all-reduces of their gradients.
  assert {"all-gather", "all-reduce"} <= {each["kind"] for each in found["collectives"]}
  row = "| dense_retnet 350M | v5e:4x4 | fsdp 16 | 64 x 2048 | yes |"
  assert row in output and row in page.read_text()


@pytest.mark.slow
def test_every_case_of_the_tpu_matrix_suits_its_slice():
  names, models = set(), {}
  for case in tpu_matrix.cases():
    config, shape = case.config(), case.topology.partition(":")[2]
    sizes = dataclasses.asdict(config.mesh) | {"slices": 1}
    assert math.prod(sizes.values()) == math.prod(map(int, shape.split("x"))), case.name
    mesh = jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes))
    sharding.check_batch(config.train.batch_size, config.data.seq_len, 1, mesh)
    if case.model not in models:
      models[case.model] = abstract_model(config.model)
    model = models[case.model]
    shapes = {name: leaf.shape for name, leaf in get_params(model).items()}
    sharding.param_shardings(logical_axes(model), shapes, mesh)
    names.add(case.name)
  assert len(names) == len(list(tpu_matrix.cases()))


def test_the_tpu_matrix_shows_what_the_compiler_refused():
  chip = {"peak": 17e9, "capacity": 16e9}
  bound = {"compute": 0.2, "memory": 0.4, "collectives": 0.1}
  moved = [{"kind": "all-gather", "count": 3, "bytes": 5e9}]
  results = {
      "a | v5e:4x4 | fsdp 16 | 16 x 2048": {"fits": False, "hbm": chip, "bound": None},
      "b | v5e:4x4 | fsdp 16 | 16 x 2048": {
          "fits": True, "hbm": chip | {"peak": 8e9}, "bound": bound, "collectives": moved,
          "matmul_flops": 4e13, "bytes_accessed": 3e11, "mfu_ceiling": 0.4,
      },
  }
  _, refused, fits = tpu_matrix.table(results)
  assert refused[:6] == ["a", "v5e:4x4", "fsdp 16", "16 x 2048", "no", "17.00 of 16"]
  assert fits[4:] == ["yes", "8.00 of 16", "40.0", "300", "all-gather 5.00", "memory", "40%"]


def test_registers_of_kernels():
  log = """ptxas info    : Compiling entry function 'loop_add' for 'sm_90a'
ptxas info    : Function properties for loop_add
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 0 barriers
I1127 05:07:18.744 subprocess_compilation.cc:356] ptxas info    : 0 bytes gmem
ptxas info    : Function properties for my_kernel
    48 bytes stack frame, 40 bytes spill stores, 60 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers
"""
  launches = (
      "014: kCustomKernel [prev=007 (3) | next=017 (3)] my_kernel grid: [4, 1, 1] "
      "threads: [128, 1, 1]  shared_memory: 49152 bytes\n"
      "015: kAsyncDone    [source       | sink        ] async_id=10\n"
  )
  found = registers.kernels(log, launches)
  assert found == {
      "loop_add": registers.Kernel(8, 0),
      "my_kernel": registers.Kernel(255, 100, "4, 1, 1", "128, 1, 1", 49152),
  }
  assert registers.table(found)[1] == [
      "my_kernel", "255", "100", "4, 1, 1", "128, 1, 1", "49152"
  ]
  with pytest.raises(SystemExit, match="no kernels were compiled"):
    registers.main(["--", sys.executable, "-c", "pass"])

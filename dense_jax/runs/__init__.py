"""The Python interface to a run: train, restore, evaluate, report, publish and compile.

    from dense_jax import experiment, runs

    config = experiment.load("experiments/smoke.py:debug")
    result = runs.train_run(config, "runs/debug")
    run = runs.restore("runs/debug", "best")
    print(result.heldout_loss, runs.evaluate_run(run).held_out.perplexity)

The commands of `dense_jax.cli` parse arguments, call these functions and print the results.
"""

from dense_jax.evaluation.evaluators import Evaluator, HeldOutLoss, Snapshot
from dense_jax.runs.averaging import average_checkpoints
from dense_jax.runs.compile import CompiledProgram, compile_program
from dense_jax.runs.initial import InitFrom, base_config
from dense_jax.runs.publishing import Published, make_run, publish
from dense_jax.runs.report import Report, write_report
from dense_jax.runs.restoring import LoadedModel, Run, load_folder, restore
from dense_jax.runs.scoring import Score, evaluate_run, heldout_rows
from dense_jax.runs.tasks import evaluate_tasks
from dense_jax.runs.training import RunResult, train_run
from dense_jax.runs.verifying import Verdict, verify
from dense_jax.training.loop import Hook, Moment

__all__ = [
    "CompiledProgram", "Evaluator", "HeldOutLoss", "Hook", "InitFrom", "LoadedModel", "Moment",
    "Published", "Report", "Run", "RunResult", "Score", "Snapshot", "Verdict",
    "average_checkpoints", "base_config", "compile_program", "evaluate_run", "evaluate_tasks",
    "heldout_rows", "load_folder", "make_run", "publish", "restore", "train_run", "verify",
    "write_report",
]

"""Evaluates a model by lm-evaluation-harness (`lm_eval`), with data and task files of this machine.

    loaded = runs.load_folder("models/mamba-130m")
    results = run_harness(harness_model(loaded), ["lambada", "arc_easy"], data="../shared/data")
    print(table(results))

A script that calls `lm_eval.simple_evaluate` itself names a model after `register()`:

    lm_eval.simple_evaluate("dense_jax", model_args="workdir=runs/smoke", tasks=[...])
"""

import pathlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dense_jax.config import invalid
from dense_jax.data.spelling import prompt_ids
from dense_jax.evaluation import harness
from dense_jax.evaluation.harness import Answers, Continuation
from dense_jax.evaluation.harness_tasks import DEFINITIONS, write_task
from dense_jax.evaluation.task_data import find_task_files, read_records
from dense_jax.generation.generator import Generator
from dense_jax.generation.requests import Request
from dense_jax.generation.sampling import Sampling
from dense_jax.runs.restoring import LoadedModel, load_folder, restore
from dense_jax.runs.tasks import make_likelihood

# Its default of 100,000 takes minutes for the perplexity of LAMBADA.
_BOOTSTRAP = 1000


def answers(loaded: LoadedModel, *, batch_size: int = 16, carried: bool = True) -> Answers:
  """Makes what answers the harness's requests.

  Args:
    loaded: the model.
    batch_size: rows of a batch.
    carried: whether contexts and documents of any length are read; see `Likelihood`. False reads
      as many tokens as the harness's own back ends do.
  """
  return Answers(
      loaded.name, loaded.tokenizer,
      make_likelihood(loaded, batch_size=batch_size, carried=carried),
      lambda wanted: _generate(loaded, wanted, batch_size),
  )


def harness_model(loaded: LoadedModel, **options: Any) -> Any:
  """Makes the harness's model of a loaded one; for the options see `answers`."""
  return register()(answers(loaded, **options))


def register() -> Any:
  """Makes the back end `dense_jax` known to the harness, and returns its class.

  Its model arguments are workdir with checkpoint, or hf, as for the commands of `dense_jax.cli`,
  and those of `answers`.

  Raises:
    InputError: lm_eval is not installed.
  """
  model_class = harness.model_class()
  model_class.load = staticmethod(_load)
  return model_class


def _load(
    *, workdir: str = "", hf: str = "", checkpoint: str = "latest", **options: Any
) -> Answers:
  if bool(workdir) == bool(hf):
    raise invalid("model_args", f"workdir={workdir},hf={hf}", "one of workdir=... and hf=...")
  return answers(load_folder(hf) if hf else restore(workdir, str(checkpoint)), **options)


def _generate(
    loaded: LoadedModel, wanted: Sequence[Continuation], batch_size: int
) -> list[str]:
  generator = Generator(loaded.model, loaded.tokenizer, batch_size=batch_size)
  results = generator([
      Request(
          prompt_ids(loaded.tokenizer, each.prompt), Sampling(**each.sampling),
          max_new_tokens=each.max_new_tokens, seed=index, stop_ids=[loaded.tokenizer.eos_id],
          stop_strings=each.until,
      )
      for index, each in enumerate(wanted)
  ])
  return [result.text for result in results]


def check_tasks(names: str, data: str | None, include_path: str | None) -> list[str]:
  """Checks, before a model is loaded, what `run_harness` is to be given.

  Args:
    names: the tasks' names, such as "lambada,piqa"; see `run_harness`.
    data: see `run_harness`.
    include_path: see `run_harness`.

  Returns:
    The names.

  Raises:
    InputError: lm_eval is not installed, a task is not known, or a file or folder is missing.
  """
  harness.require()
  if include_path is not None and not pathlib.Path(include_path).expanduser().is_dir():
    raise invalid("--include-path", include_path, "a folder of the harness's task files")
  with harness.quiet():
    known = {*DEFINITIONS, *_manager(include_path).all_tasks}
  tasks = list(dict.fromkeys(filter(None, map(str.strip, names.split(",")))))
  unknown = next((task for task in tasks if task not in known), None)
  if unknown is not None or not tasks:
    raise invalid("--tasks", names, f"some of {', '.join(sorted(known))}, with commas between")
  for task in tasks:
    if task in DEFINITIONS:
      if data is None:
        raise invalid("--data", None, "a folder that has the tasks' files")
      find_task_files(task, data)
  return tasks


def run_harness(
    model: Any, tasks: Sequence[str], *, data: str | None = None, include_path: str | None = None,
    limit: int | None = None, shots: int | None = None, first_shots: bool = False,
    samples: bool = False,
) -> dict[str, Any]:
  """Evaluates a model by the harness, offline.

  Args:
    model: a model of the harness, such as one of `harness_model`.
    tasks: names of this project's tasks (keys of `DEFINITIONS`), and of tasks in `include_path`;
      `check_tasks` checks them.
    data: the folder of the data of this project's tasks; see `dense_jax.evaluation.task_data`.
    include_path: a folder of further task files, whose data the harness must find by itself.
    limit: the most documents of a task; None means all.
    shots: examples in a prompt; None means what a task file says, which is none for our own.
    first_shots: all prompts have the same examples, which are then read once; see `write_task`.
    samples: whether the results have each document with its requests and their scores.

  Returns:
    The harness's results: "results" has each task's metrics by "<metric>,none" and
    "<metric>_stderr,none". Standard errors of perplexities are of 1,000 bootstrap samples.

  Raises:
    InputError: lm_eval is not installed, or data are missing or malformed, or a task of
      `include_path` cannot be loaded.
  """
  lm_eval = harness.require()
  with tempfile.TemporaryDirectory() as folder, harness.quiet():
    names = [
        _write_task(pathlib.Path(folder), task, data or "", bool(shots), first_shots)
        if task in DEFINITIONS else task
        for task in tasks
    ]
    manager = _manager(folder, include_path)
    _try_to_load(manager, [task for task in tasks if task not in DEFINITIONS])
    results = lm_eval.simple_evaluate(
        model, tasks=names, num_fewshot=shots, limit=limit, task_manager=manager,
        log_samples=samples, bootstrap_iters=_BOOTSTRAP,
    )
  return dict(results)


def _manager(*folders: str | None) -> Any:
  from lm_eval.tasks import TaskManager

  paths = [pathlib.Path(folder).expanduser() for folder in folders if folder is not None]
  return TaskManager(include_path=paths, include_defaults=False)


def _try_to_load(manager: Any, tasks: Sequence[str]) -> None:
  """Refuses task files of the user that the harness cannot load; their code may raise anything."""
  for task in tasks:
    try:
      manager.load([task])
    except Exception as error:
      raise invalid(
          "--tasks", task, f"a task file that the harness can load, with data on this machine "
          f"({type(error).__name__}: {error})",
      ) from error


def _write_task(
    folder: pathlib.Path, task: str, data: str, has_shots: bool, first_shots: bool
) -> str:
  """Writes one of this project's tasks for the harness; returns its name there."""
  scored, examples = find_task_files(task, data)
  return write_task(
      folder, task, read_records(task, scored),
      read_records(task, examples) if has_shots and examples is not None else None,
      first_shots=first_shots,
  )


def summary(results: Mapping[str, Any]) -> dict[str, Any]:
  """Returns what a file of the results needs: versions, counts, and each task's metrics."""
  return {
      "lm_eval": results["lm_eval_version"],
      "model": results["config"]["model_name"],
      "tasks": {
          name: {
              "version": results["versions"].get(name),
              "shots": results["n-shot"].get(name, 0),
              "documents": results["n-samples"][name]["effective"],
              **{
                  key.removesuffix(",none"): value for key, value in metrics.items() if "," in key
              },
          }
          for name, metrics in results["results"].items()
      },
  }


def item_lines(results: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
  """Yields each document's prompts, responses and metrics, of results with samples."""
  kept = ("doc_id", "arguments", "resps", "target")
  for name, samples in results["samples"].items():
    for sample in samples:
      metrics = {metric: sample[metric] for metric in sample["metrics"]}
      yield {"task": name, **{key: sample[key] for key in kept}, **metrics}


def table(results: Mapping[str, Any]) -> str:
  """Returns the harness's own table of the results, in Markdown."""
  from lm_eval.utils import make_table

  return str(make_table(results))

"""Models in PyTorch on a CPU, which another process times step by step.

Started by `experiments.benchmarks.torch_client`, by the Python that has torch and transformers.
Imports nothing of dense_jax, so that it runs in an environment without jax. It reads one JSON
object a line from standard input, and answers each by one on standard output:

    {"do": "load", "folder": F, "code": C}      reads the model in a Hugging Face folder F; C is the
                                                authors' modelling file, or "" for transformers' own
                                                class -> {"parameters", "threads", "versions"}
    {"do": "batch", "tokens": [[...]]}          the rows to train on -> {"loss"}, before any step
    {"do": "train"}                             forward, backward and AdamW -> {"seconds"}
    {"do": "decode", "tokens": [[...]], "count": N}
                                                continues prompts greedily by the model's own
                                                `generate` -> {"seconds"}, of one token

A failure answers {"error": what it was}, and the process ends.
"""

import importlib
import importlib.util
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any


def _authors_class(torch_models: Any, code: str) -> Any:
  """Returns the class of the authors' file, which was written for transformers 4.29."""
  # Used for sampling alone, and gone from transformers.
  if not hasattr(torch_models, "top_k_top_p_filtering"):
    torch_models.top_k_top_p_filtering = None
  spec = importlib.util.spec_from_file_location("modeling_dense_gau_retnet", code)
  if spec is None or spec.loader is None:
    raise ImportError(f"{code} is not a Python file")
  module = importlib.util.module_from_spec(spec)
  sys.modules[spec.name] = module
  spec.loader.exec_module(module)
  model = module.LlamaForCausalLM
  # A list until transformers 5. With an untied head it says nothing.
  if isinstance(getattr(model, "_tied_weights_keys", None), list):
    model._tied_weights_keys = None
  return model


class Rival:
  """A model, its optimizer, and the rows that it trains on."""

  def __init__(self) -> None:
    self._torch = importlib.import_module("torch")
    self._models = importlib.import_module("transformers")
    self._torch.manual_seed(0)
    self._torch.set_num_threads(len(os.sched_getaffinity(0)))
    self._model: Any = None
    self._optimizer: Any = None
    self._rows: Any = None

  def load(self, folder: str, code: str) -> dict[str, Any]:
    """Makes the model with the folder's configuration and weights."""
    values = json.loads((pathlib.Path(folder) / "config.json").read_text())
    if code:
      values |= {"dropout": 0.0, "deepnorm": False, "use_cache": False, "initializer_range": 0.02}
      self._model = _authors_class(self._models, code)(self._models.LlamaConfig(**values))
      load_file = importlib.import_module("safetensors.torch").load_file
      tensors = load_file(pathlib.Path(folder) / "model.safetensors")
      missing, unexpected = self._model.load_state_dict(tensors, strict=False)
      # The first layer's gates and norms, which read nothing, and constants.
      missing = [name for name in missing if ".layers.0." not in name and "rel_pos" not in name]
      if missing or unexpected:
        raise KeyError(f"weights that only one side has: {missing + unexpected}")
    else:
      name = values["architectures"][0]
      self._model = getattr(self._models, name).from_pretrained(folder, dtype="float32")
    self._optimizer = None
    names = ("torch", "transformers")
    return {
        "parameters": sum(parameter.numel() for parameter in self._model.parameters()),
        "threads": self._torch.get_num_threads(),
        "versions": {name: str(importlib.import_module(name).__version__) for name in names},
    }

  def batch(self, tokens: list[list[int]]) -> dict[str, Any]:
    """Keeps rows to train on."""
    self._rows = self._torch.tensor(tokens)
    with self._torch.no_grad():
      return {"loss": float(self._model(input_ids=self._rows, labels=self._rows).loss)}

  def train(self) -> dict[str, Any]:
    """Runs one step."""
    torch, model = self._torch, self._model
    if self._optimizer is None:
      model.train()
      self._optimizer = torch.optim.AdamW(
          model.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=True
      )
    start = time.perf_counter()
    loss = model(input_ids=self._rows, labels=self._rows).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    self._optimizer.step()
    self._optimizer.zero_grad(set_to_none=True)
    float(loss.detach())
    return {"seconds": time.perf_counter() - start}

  def decode(self, tokens: list[list[int]], count: int) -> dict[str, Any]:
    """Continues prompts; the time per token includes reading the prompts, token by token."""
    torch = self._torch
    self._model.eval()
    prompts = torch.tensor(tokens)
    settings = self._models.GenerationConfig(
        max_new_tokens=count, min_new_tokens=count, do_sample=False, use_cache=True,
        pad_token_id=0, temperature=1.0,
    )
    with torch.inference_mode():
      start = time.perf_counter()
      self._model.generate(prompts, generation_config=settings)
      seconds = time.perf_counter() - start
    return {"seconds": seconds / (prompts.shape[1] - 1 + count)}


def serve(make: Callable[[], Any]) -> None:
  """Answers requests by the methods of what `make` makes, until standard input ends."""
  answers = sys.stdout
  sys.stdout = sys.stderr  # Whatever libraries print must not get between answers.
  server: Any = None
  for line in sys.stdin:
    request = json.loads(line)
    try:
      server = server or make()
      answer = getattr(server, request.pop("do"))(**request)
    except Exception as error:  # Told to the other process, which says what failed.
      answer = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(answer), file=answers, flush=True)
    if "error" in answer:
      return


if __name__ == "__main__":
  serve(Rival)

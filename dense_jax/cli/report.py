"""What a finished run shows: the table, the samples, the plot, the next commands."""

import io
import math
import os
import pathlib
import resource
import shlex
import sys
from collections.abc import Iterable, Sequence

from etils import epath

from dense_jax.cli.common import table
from dense_jax.cli.terminal import printable
from dense_jax.config import ExperimentConfig
from dense_jax.data.packing import TokenStore
from dense_jax.data.pipeline import Datasets
from dense_jax.data.sources import Document
from dense_jax.data.tokenizer import spell
from dense_jax.evaluation.baselines import byte_ngram_bits_per_byte, xz_bits_per_byte
from dense_jax.evaluation.perplexity import HeldOut
from dense_jax.files import write_atomically
from dense_jax.generation.decode import Generator
from dense_jax.generation.sampling import Sampling
from dense_jax.models.language_model import LanguageModel
from dense_jax.training.metrics import read_metrics
from dense_jax.types import Params

# Baselines read at most this much text of each part, in bytes.
_BASELINE_BYTES = 64 * 2**20
# matplotlib computes with numbers far beyond those that it draws.
_LARGEST_DRAWN = 1e100
PLOT_FILE = "loss.png"


def parameter_table(params: Params) -> str:
  """Parameters by module; the same module of all layers is one row."""
  sizes: dict[str, int] = {}
  for name, leaf in params.items():
    parts = [part for part in name.split(".") if not part.isdigit()]
    module = ".".join(part for part in parts if part not in ("prefix_layers", "scanned_layers"))
    module = module.removesuffix(".kernel").removesuffix(".scale")
    sizes[module] = sizes.get(module, 0) + leaf.size
  total = sum(sizes.values())
  rows = [("module", "parameters", "share")]
  rows += [(name, f"{size:,}", f"{size / total:.1%}") for name, size in sorted(sizes.items())]
  return table([*rows, ("all", f"{total:,}", f"{1:.1%}")])


def peak_memory() -> int:
  """The process's peak resident set, bytes."""
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak if sys.platform == "darwin" else peak * 1024


def targets_per_byte(store: TokenStore) -> float:
  """Tokens to predict in a byte of the store's text."""
  return store.num_targets / store.num_bytes


def _text(documents: Iterable[Document]) -> bytes:
  """The documents' text, up to the baselines' limit."""
  parts, size = [], 0
  for document in documents:
    parts.append(document.text.encode())
    size += len(parts[-1])
    if size >= _BASELINE_BYTES:
      break
  return b"".join(parts)[:_BASELINE_BYTES]


def comparison(
    held_out: HeldOut, data: Datasets, name: str, tokens_per_second: Sequence[float]
) -> str:
  """The closing table: bits per byte beside the baselines, speed and memory."""
  train, heldout = _text(data.train_source), _text(data.heldout_source)
  bits = held_out.bits_per_byte(targets_per_byte(data.heldout))
  rows = [
      ("held-out text", "bits per byte"),
      ("byte bigram", f"{byte_ngram_bits_per_byte(train, heldout, 2):.3f}"),
      ("byte trigram", f"{byte_ngram_bits_per_byte(train, heldout, 3):.3f}"),
      ("xz -9", f"{xz_bits_per_byte(heldout):.3f}"),
      (name, _fixed(bits, 3)),
      ("", ""),
      ("perplexity per token", _fixed(held_out.perplexity, 2)),
  ]
  if held_out.context:
    rows.append(("context", held_out.context))
  if tokens_per_second:
    median = sorted(tokens_per_second)[len(tokens_per_second) // 2]
    rows.append(("training tokens/s (median)", f"{median:,.0f}"))
  rows.append(("peak memory (RSS)", f"{peak_memory() / 2**20:,.0f} MiB"))
  return table(rows)


def samples(model: LanguageModel, data: Datasets, *, seed: int) -> list[tuple[str, str]]:
  """Two prompts, the beginnings of held-out documents, and what they are continued with.

  Joined, a prompt and its continuation are the text that the tokenizer spells for both, printable.
  """
  store, tokenizer = data.heldout, data.tokenizer
  texts = []
  for document in (0, store.num_documents // 2):
    first, is_last = store.starts[document], document + 1 == store.num_documents
    end = store.num_tokens if is_last else store.starts[document + 1]
    # Without the document's bos and its end token.
    texts.append(store.tokens[first + 1 : min(first + 24, end - 1)].tolist())
  generator = Generator(model, Sampling(temperature=0.8, top_p=0.95))
  prompts = [[tokenizer.bos_id, *ids] for ids in texts]
  continuations = generator(prompts, max_new_tokens=64, seed=seed, stop_id=tokenizer.eos_id)
  pairs = []
  for ids, new_ids in zip(texts, continuations, strict=True):
    prompt, new = spell(tokenizer, ids, new_ids)
    text = printable(prompt + new)  # Joined, for a line end of two characters is one.
    pairs.append((text[: len(prompt)], text[len(prompt) :]))
  return pairs


def plot_loss(workdir: epath.Path) -> epath.Path:
  """Draws training and held-out loss of the run's metrics.

  A loss that is not finite, or beyond 1e100, leaves a gap. The axis is logarithmic unless a loss
  is not above 0 (1e-100).
  """
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  lines = read_metrics(workdir)
  figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
  drawn: list[float] = []
  for key, label, style in (("loss", "training", "-"), ("heldout_loss", "held-out", "o-")):
    points = [(line["step"], line[key]) for line in lines if key in line]
    losses = [loss if abs(loss) < _LARGEST_DRAWN else math.nan for _, loss in points]
    finite = [loss for loss in losses if not math.isnan(loss)]
    if finite:
      axes.plot([step for step, _ in points], losses, style, label=label, markersize=4)
      drawn += finite
  axes.set_xlabel("step")
  axes.set_ylabel("loss (nats per token)")
  axes.grid(alpha=0.3, which="both")
  if drawn:
    axes.legend()
  else:
    axes.text(0.5, 0.5, "no finite loss", ha="center", transform=axes.transAxes)
  if drawn and min(drawn) > 1 / _LARGEST_DRAWN:
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    # Names of the ticks between powers of ten, where there are few of those.
    axes.yaxis.set_minor_formatter("{x:g}" if max(drawn) < 1e3 * min(drawn) else "")
  file = workdir / PLOT_FILE
  image = io.BytesIO()
  figure.savefig(image, dpi=120)
  pyplot.close(figure)
  write_atomically(file, image.getvalue())
  return file


def next_commands(arguments: Sequence[str], workdir: str, config: ExperimentConfig) -> str:
  """The commands that go on from here, to be pasted."""
  folder = shlex.quote(workdir)
  more = [a for a in arguments if not a.startswith("--config.train.steps")]
  resume = shlex.join([*more, f"--config.train.steps={2 * config.train.steps}"])
  executable = pathlib.Path(sys.executable)
  if executable.is_relative_to(pathlib.Path.cwd()):
    executable = executable.relative_to(pathlib.Path.cwd())
  python = shlex.quote(str(executable))
  # Large buffers in huge pages (see Makefile), if this run had them.
  tunables = os.environ.get("GLIBC_TUNABLES", "")
  faster = f"GLIBC_TUNABLES={shlex.quote(tunables)} " if tunables else ""
  return "\n".join([
      f"resume    {faster}{python} -m dense_jax.cli.train {resume}",
      f"evaluate  {python} -m dense_jax.cli.evaluate --workdir {folder}",
      f"sample    {python} -m dense_jax.cli.generate --workdir {folder} --prompt 'import '",
  ])


def perplexity_line(held_out: HeldOut, bits: float) -> str:
  """One line of figures, and how the context was treated."""
  context = f" (context: {held_out.context})" if held_out.context else ""
  if not math.isfinite(held_out.loss):
    return f"held-out loss {held_out.loss}{context}"
  return (
      f"held-out loss {_fixed(held_out.loss, 4)} nats/token, perplexity "
      f"{_fixed(held_out.perplexity, 2)}, {_fixed(bits, 3)} bits/byte{context}"
  )


def _fixed(value: float, digits: int) -> str:
  """A number with so many digits after the point, or in powers of ten where it is long."""
  return f"{value:.{digits}f}" if abs(value) < 1e7 else f"{value:.3e}"

"""Processes that encode documents, and what runs in each of them.

A worker is `python -m dense_jax.data.corpus.workers TOKENIZER_FOLDER`, which reads lists of texts
from its standard input and answers each with a list of documents' ids (`DocumentEncoder`). It ends
when its input does, and so with its parent, however that ends. The pool is no `multiprocessing`
pool: its children would import the whole program again, and outlive a parent that is killed.
"""

import collections
import concurrent.futures
import contextlib
import os
import pickle
import queue
import re
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from dense_jax.data.corpus.encoding import DocumentEncoder
from dense_jax.data.corpus.files import Group
from dense_jax.data.tokenizer import load_saved_tokenizer
from dense_jax.errors import InputError

_SIZE = struct.Struct("<Q")
# Groups of texts that are under way for each worker, so that none of them waits.
_AHEAD = 3


def usable_cores() -> int:
  """Returns the number of cores that this process may run on."""
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class EncoderPool:
  """Encodes groups of texts in several processes, and gives them back in order."""

  def __init__(self, tokenizer_folder: Path, workers: int) -> None:
    """Starts the processes.

    Args:
      tokenizer_folder: where `Tokenizer.save` has written the tokenizer.
      workers: their number, >= 1.
    """
    # Each process encodes on one core: -P keeps the current folder's modules out of its imports.
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": _package_path()}
    self._processes = [
        subprocess.Popen(
            [sys.executable, "-P", "-m", __name__, str(tokenizer_folder)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment,
        )
        for _ in range(workers)
    ]
    self._idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
    for process in self._processes:
      self._idle.put(process)
    self._threads = concurrent.futures.ThreadPoolExecutor(workers)

  def map(self, groups: Iterator[Group]) -> Iterator[tuple[Group, list[bytes]]]:
    """Yields each group with its documents' ids, in order; few groups are in memory at a time.

    Raises:
      InputError: a process has died.
      RuntimeError: a process failed.
    """
    waiting: collections.deque[tuple[Group, concurrent.futures.Future[list[bytes]]]]
    waiting = collections.deque()
    for group in groups:
      waiting.append((group, self._threads.submit(self._encode, group.texts)))
      if len(waiting) > _AHEAD * len(self._processes):
        first, encoded = waiting.popleft()
        yield first, encoded.result()
    for group, encoded in waiting:
      yield group, encoded.result()

  def _encode(self, texts: Sequence[str]) -> list[bytes]:
    process = self._idle.get()
    assert process.stdin is not None and process.stdout is not None
    try:
      _write(process.stdin, [*texts])
      answer = _read(process.stdout)
    except (OSError, EOFError) as error:
      raise InputError(
          f"a process that encodes has died (status {process.wait()}); perhaps memory ran out: "
          "fewer --workers need less. The same command goes on"
      ) from error
    finally:
      self._idle.put(process)
    if isinstance(answer, str):
      raise RuntimeError(f"a process that encodes failed: {answer}")
    return answer

  def peak_memory(self) -> int:
    """Returns the most memory (RSS, in bytes) that a process has had; 0 where none can tell."""
    peaks = [0]
    for process in self._processes:
      # Not getrusage of children, which counts what this process had when it started them.
      with contextlib.suppress(OSError):
        status = Path(f"/proc/{process.pid}/status").read_text()
        peaks += [int(kilobytes) << 10 for kilobytes in re.findall(r"VmHWM:\s*(\d+) kB", status)]
    return max(peaks)

  def close(self) -> None:
    """Ends the processes."""
    for process in self._processes:
      process.kill()
    self._threads.shutdown(cancel_futures=True)
    for process in self._processes:
      process.communicate()


class InlineEncoder:
  """Encodes groups of texts in this process, with the interface of `EncoderPool`."""

  def __init__(self, encode: Callable[[Sequence[str]], list[bytes]]) -> None:
    """Takes a `DocumentEncoder`."""
    self._encode = encode

  def map(self, groups: Iterator[Group]) -> Iterator[tuple[Group, list[bytes]]]:
    """Yields each group with its documents' ids."""
    for group in groups:
      yield group, self._encode(group.texts)


def _package_path() -> str:
  root = str(Path(__file__).resolve().parents[3])
  return os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))


def _write(stream: Any, value: Any) -> None:
  content = pickle.dumps(value, pickle.HIGHEST_PROTOCOL)
  stream.write(_SIZE.pack(len(content)))
  stream.write(content)
  stream.flush()


def _read(stream: Any) -> Any:
  """Reads what the other end of a pipe to one's own parent or child has written."""
  head = stream.read(_SIZE.size)
  if len(head) < _SIZE.size:
    raise EOFError
  (size,) = _SIZE.unpack(head)
  content = stream.read(size)
  if len(content) < size:
    raise EOFError
  return pickle.loads(content)


def main(tokenizer_folder: str, source: BinaryIO, target: BinaryIO) -> None:
  """Answers until the input ends."""
  # A terminal sends these to parent and child alike; the parent decides what to do.
  for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
  encode = DocumentEncoder(load_saved_tokenizer(tokenizer_folder))
  while True:
    try:
      texts = _read(source)
    except EOFError:
      return
    try:
      answer: list[bytes] | str = encode(texts)
    except Exception as error:
      answer = f"{type(error).__name__}: {error}"
    try:
      _write(target, answer)
    except BrokenPipeError:  # The parent has gone.
      return


if __name__ == "__main__":
  main(sys.argv[1], sys.stdin.buffer, sys.stdout.buffer)

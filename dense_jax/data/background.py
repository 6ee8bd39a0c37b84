"""Runs compiled code in a way that signals can interrupt."""

import concurrent.futures
import threading
from collections.abc import Callable
from typing import TypeVar

ResultT = TypeVar("ResultT")


def in_thread(function: Callable[[], ResultT]) -> ResultT:
  """Runs a function in another thread, and returns or raises what it does.

  Python runs signal handlers in the main thread, between bytecodes. A long call of compiled code
  would delay them until it returns; waiting for a future does not, if the code releases the global
  interpreter lock. The thread is a daemon, so that nobody waits for it if a handler raises here.
  """
  result: concurrent.futures.Future[ResultT] = concurrent.futures.Future()

  def run() -> None:
    try:
      result.set_result(function())
    except BaseException as error:
      result.set_exception(error)

  threading.Thread(target=run, daemon=True).start()
  return result.result()

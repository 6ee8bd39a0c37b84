"""A headless Chromium for tests, driven by its own protocol over a pipe.

Debian's `chromium-headless-shell` is enough; no driver and no package is needed. The messages are
those of the Chrome DevTools Protocol, https://chromedevtools.github.io/devtools-protocol/.
"""

import base64
import dataclasses
import io
import json
import os
import pathlib
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from PIL import Image

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")
HEIGHT = 900
_SECONDS = 60

# Waits until every picture is decoded (a broken one rejects), and says what a reader gets.
_SEEN = """
(async () => {
  const broken = [];
  for (const image of document.images)
    await image.decode().catch(() => broken.push(image.alt));
  return {
    broken,
    pictures: [...document.images].map(image => {
      const box = image.getBoundingClientRect();
      return {alt: image.alt, natural: image.naturalWidth,
              box: [box.left, box.top + scrollY, box.right, box.bottom + scrollY]};
    }),
    links: [...document.querySelectorAll('a[href^="#"]')].filter(
      link => !document.getElementById(link.hash.slice(1))).length,
    width: document.documentElement.scrollWidth,
  };
})()
"""


@dataclasses.dataclass
class Seen:
  """What a browser shows of a page.

  Attributes:
    width: the width of the page's content, in CSS pixels: above the window's, it scrolls sideways.
    pictures: description -> (natural width in pixels, what the screen shows of it [H, W, 3]).
    broken: the descriptions of pictures that could not be decoded.
    dead_links: how many links lead to no place of the page.
    requests: the addresses that the page asked for, but for its own and data in itself.
    complaints: messages of the console, errors and exceptions.
    screen: the whole page [H, W, 3].
  """

  width: int
  pictures: dict[str, tuple[int, np.ndarray]]
  broken: list[str]
  dead_links: int
  requests: list[str]
  complaints: list[str]
  screen: np.ndarray


class Browser:
  """A browser process with one tab."""

  def __init__(self, executable: str, folder: pathlib.Path) -> None:
    own_read, its_write = os.pipe()
    its_read, own_write = os.pipe()
    # The browser reads from descriptor 3 and writes to 4; it is not to look anything up itself.
    arguments = [
        executable, "--headless", "--remote-debugging-pipe", f"--user-data-dir={folder}",
        "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
        "--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND", "about:blank",
    ]
    with (folder / "log").open("wb") as log:
      self._process = subprocess.Popen(
          ["bash", "-c", f'exec "$@" 3<&{its_read} 4>&{its_write}', "bash", *arguments],
          stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=(its_read, its_write),
      )
    os.close(its_read)
    os.close(its_write)
    self._read, self._write = own_read, own_write
    self._buffer = b""
    self._count = 0
    self._session = ""
    self._events: list[dict[str, Any]] = []
    tab = self._do("Target.createTarget", url="about:blank")["targetId"]
    self._session = self._do("Target.attachToTarget", targetId=tab, flatten=True)["sessionId"]
    for domain in ("Page", "Runtime", "Network", "Log"):
      self._do(f"{domain}.enable")

  def open(self, file: pathlib.Path, width: int) -> Seen:
    """Opens a page in a window of a width in CSS pixels."""
    self._events = []
    self._do("Emulation.setDeviceMetricsOverride", width=width, height=HEIGHT,
             deviceScaleFactor=1, mobile=False)
    self._do("Page.navigate", url=file.as_uri())
    while not self._named("Page.loadEventFired"):
      self._events.append(self._message())
    found = self._do("Runtime.evaluate", expression=_SEEN, awaitPromise=True, returnByValue=True)
    seen = found["result"]["value"]
    shot = self._do("Page.captureScreenshot", captureBeyondViewport=True)["data"]
    screen = np.asarray(Image.open(io.BytesIO(base64.b64decode(shot))).convert("RGB"))
    pictures = {}
    for each in seen["pictures"]:
      left, top, right, bottom = (round(side) for side in each["box"])
      pictures[each["alt"]] = each["natural"], screen[top:bottom, left:right]
    asked = [event["request"]["url"] for event in self._named("Network.requestWillBeSent")]
    own = file.as_uri()
    return Seen(
        seen["width"], pictures, seen["broken"], seen["links"],
        [url for url in asked if url != own and not url.startswith("data:")],
        [json.dumps(event) for name in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown",
                                        "Log.entryAdded") for event in self._named(name)],
        screen,
    )

  def close(self) -> None:
    """Ends the process."""
    os.close(self._write)  # The browser ends when its pipe does.
    os.close(self._read)
    try:
      self._process.wait(10)
    except subprocess.TimeoutExpired:
      self._process.kill()
      self._process.wait()

  def _named(self, method: str) -> list[dict[str, Any]]:
    return [event["params"] for event in self._events if event.get("method") == method]

  def _do(self, method: str, **params: Any) -> dict[str, Any]:
    """Sends a command, and returns its result; events that come before it are kept."""
    self._count += 1
    command: dict[str, Any] = {"id": self._count, "method": method, "params": params}
    if self._session:
      command["sessionId"] = self._session
    os.write(self._write, json.dumps(command).encode() + b"\0")
    while (message := self._message()).get("id") != self._count:
      self._events.append(message)
    assert "error" not in message, message
    return message["result"]

  def _message(self) -> dict[str, Any]:
    """Returns the next message, which ends in a zero byte."""
    end = time.monotonic() + _SECONDS
    while b"\0" not in self._buffer:
      ready, _, _ = select.select([self._read], [], [], max(end - time.monotonic(), 0))
      part = os.read(self._read, 2**16) if ready else b""
      assert part, f"the browser {'ended' if ready else 'says nothing'}"
      self._buffer += part
    message, _, self._buffer = self._buffer.partition(b"\0")
    return json.loads(message)


@contextmanager
def open_browser(folder: pathlib.Path) -> Iterator[Browser]:
  """Starts a browser with its profile in a folder; skips the test where none is installed."""
  found = next((path for name in NAMES if (path := shutil.which(name))), None)
  if found is None:
    pytest.skip("no browser here: install chromium-headless-shell (Debian), chromium or Chrome")
  browser = Browser(found, folder)
  try:
    yield browser
  finally:
    browser.close()

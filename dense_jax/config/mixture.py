"""The text of `config.data.mixture`: shares of the parts of a corpus, from given steps on."""

import dataclasses
import fractions
import math
import re
from collections.abc import Mapping

from dense_jax.config.fields import LARGEST, invalid

KEY = "config.data.mixture"
VALID = (
    'empty, or shares of the corpus\'s parts, such as "web=0.7,books=0.3"; or several, each from a '
    'step on, such as "web=7,books=3; 20000: web=1,books=1"'
)
# A part's name, which is that of its files too.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
# Shares in whole numbers, so that a mixture repeats after so many rows at most.
_MOST_ROWS = 100_000
_NUMBER = re.compile(r"\d{1,12}(\.\d{1,12})?")


@dataclasses.dataclass(frozen=True)
class Mixture:
  """Shares of parts, from a step on.

  Attributes:
    step: the first step, whose batch is that of number `step`, from 0 on.
    shares: part -> its share, an integer >= 1, without a common factor.
  """

  step: int
  shares: Mapping[str, int]

  def __str__(self) -> str:
    shares = ",".join(f"{name}={self.shares[name]}" for name in sorted(self.shares))
    return f"{self.step}: {shares}"


def parse_mixtures(text: str) -> tuple[Mixture, ...]:
  """Parses `config.data.mixture`.

  Returns:
    The mixtures by increasing step, the first of them from step 0 on; () for an empty text.

  Raises:
    InputError: the text is not valid, or its shares need more than 100,000 rows to come out even.
  """
  if not text.strip():
    return ()
  mixtures: list[Mixture] = []
  for entry in text.split(";"):
    before, separator, listed = entry.rpartition(":")
    step = before.strip() if separator else "0"
    if not (step.isascii() and step.isdecimal()) or len(step) > 10 or int(step) > LARGEST:
      raise invalid(KEY, text, f"{VALID}; {entry.strip()!r} names no step")
    mixtures.append(Mixture(int(step), _shares(listed, text)))
  steps = [mixture.step for mixture in mixtures]
  if steps[0] or sorted(set(steps)) != steps:
    raise invalid(KEY, text, f"{VALID}; steps begin with 0 and increase")
  return tuple(mixtures)


def _shares(listed: str, text: str) -> dict[str, int]:
  shares: dict[str, fractions.Fraction] = {}
  for pair in listed.split(","):
    name, _, number = (part.strip() for part in pair.partition("="))
    if not NAME.fullmatch(name) or not _NUMBER.fullmatch(number) or name in shares:
      raise invalid(KEY, text, f"{VALID}; {pair.strip()!r} is no part with its share")
    shares[name] = fractions.Fraction(number)
  shares = {name: share for name, share in shares.items() if share}
  if not shares:
    raise invalid(KEY, text, f"{VALID}; all shares are 0")
  scale = math.lcm(*(share.denominator for share in shares.values()))
  whole = {name: int(share * scale) for name, share in shares.items()}
  common = math.gcd(*whole.values())
  whole = {name: share // common for name, share in whole.items()}
  if sum(whole.values()) > _MOST_ROWS:
    raise invalid(
        KEY, text, f"{VALID}; shares with fewer digits, for these come out even only after "
        f"{sum(whole.values()):,} rows, of {_MOST_ROWS:,} at most"
    )
  return whole

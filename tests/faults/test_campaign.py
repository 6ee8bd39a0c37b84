"""The fault campaign: a short one with the quick tests, a part of the whole with the slow ones."""

import subprocess
import sys

import pytest

from tests.helpers import ROOT


def campaign(*arguments, timeout):
  result = subprocess.run(
      [sys.executable, "-m", "tests.faults.campaign", *arguments], cwd=ROOT, capture_output=True,
      text=True, timeout=timeout, check=False,
  )
  print(result.stdout)
  assert result.returncode == 0, result.stdout + result.stderr


def test_a_few_faults_of_each_kind_are_survived():
  campaign("--size", "short", timeout=300)


@pytest.mark.slow
def test_a_part_of_the_campaign_is_survived():
  campaign("--size", "part", timeout=1500)

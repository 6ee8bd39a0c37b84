"""Means, their errors and their p-values, as by hand."""

import math

import pytest

from dense_jax.statistics import Estimate


def test_means_and_errors_by_hand():
  found = Estimate.of([4.0, 4.2, 4.4])
  assert found.mean == pytest.approx(4.2) and found.error == pytest.approx(0.2 / math.sqrt(3))
  assert found.decided and found.count == 3
  assert math.isnan(Estimate.of([1.0]).error) and not Estimate.of([1.0]).decided
  assert Estimate.of([]).count == 0


@pytest.mark.parametrize(("values", "expected"), [
    # Student's t in closed form, of one, two and four degrees of freedom.
    ((1.0, 2.0), 1 - 2 / math.pi * math.atan(3)),
    ((1.0, 2.0, 3.0), 1 - math.sqrt(12 / 14)),
    ((-1.0, -2.0, -3.0), 1 - math.sqrt(12 / 14)),
    ((-1.0, 0.0, 2.0, 4.0, 5.0), 1 - math.sqrt(10 / 23) * (1 + 13 / 46)),
    ((0.5, 0.5), 0.0),
    ((0.0, 0.0), 1.0),
])
def test_p_values_by_hand(values, expected):
  assert Estimate.of(values).p_value == pytest.approx(expected)


@pytest.mark.parametrize("other", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_leaves_nothing_to_estimate(other):
  for values in ([other], [other, 1.0], [other, other], [math.inf, -math.inf, 2.0]):
    found = Estimate.of(values)
    assert math.isnan(found.mean) and math.isnan(found.error) and math.isnan(found.p_value)
    assert found.count == len(values) and not found.decided


@pytest.mark.parametrize("count", [0, 1])
def test_no_p_value_without_a_spread(count):
  assert math.isnan(Estimate.of([1.0] * count).p_value)

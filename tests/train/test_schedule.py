"""The learning rate is a function of the step."""

from __future__ import annotations

import itertools

import pytest

from vitrail.errors import ConfigError
from vitrail.train.schedule import Course, Schedule


@pytest.mark.parametrize("course", ["cosine", "linear", "poly", "constant", "rsqrt", "step"])
def test_every_course_climbs_in_warm_up_and_never_again(course: Course) -> None:
    schedule = Schedule(course=course, steps=100, warmup=10, cooldown=20)
    factors = [schedule(step) for step in range(100)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert max(factors) == 1.0
    assert all(after <= before for before, after in itertools.pairwise(factors[10:]))
    assert min(factors) >= 0


def test_cosine_is_half_at_half_and_ends_at_its_floor() -> None:
    schedule = Schedule(steps=110, warmup=10, floor=0.1)
    assert schedule(60) == pytest.approx(0.55)
    assert schedule(109) == pytest.approx(0.1, abs=1e-3)


def test_poly_is_what_is_left_to_the_power_of_nine_tenths() -> None:
    schedule = Schedule(course="poly", steps=80, floor=0.01)
    assert schedule(40) == pytest.approx(0.01 + 0.99 * 0.5**0.9)


def test_step_divides_by_ten_twice() -> None:
    schedule = Schedule(course="step", steps=90)
    assert [schedule(step) for step in (0, 29, 30, 59, 60, 89)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_rsqrt_falls_with_the_root_of_the_step_and_cools_down_in_a_line() -> None:
    schedule = Schedule(course="rsqrt", steps=200, warmup=25, cooldown=40)
    assert [schedule(step) for step in (24, 99, 159)] == pytest.approx([1.0, 1 / 2, (25 / 160) ** 0.5])
    assert schedule(180) == pytest.approx((25 / 181) ** 0.5 / 2)  # 20 of its 40 last steps are left
    assert schedule(199) == pytest.approx((25 / 200) ** 0.5 / 40)


def test_illegal_courses_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least 1 step"):
        Schedule(steps=0)
    with pytest.raises(ConfigError, match="shorten"):
        Schedule(steps=5, warmup=6)
    with pytest.raises(ConfigError, match="times the peak"):
        Schedule(steps=5, floor=2)

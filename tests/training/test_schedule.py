import math

import pytest

from onestage.errors import ConfigError
from onestage.training.optimization import WarmupSchedule


def test_warmup_rises_linearly_from_its_start() -> None:
    schedule = WarmupSchedule(kind="constant", warmup_steps=10, warmup_start=0.1)
    # 0.1 + 0.9 * 5 / 10 = 0.55
    assert [schedule.factor(step, 100) for step in (0, 5, 10, 99)] == pytest.approx([0.1, 0.55, 1.0, 1.0])


def test_steps_are_taken_at_shares_of_the_run() -> None:
    schedule = WarmupSchedule(kind="step", warmup_steps=0, milestones=(2 / 3, 5 / 6), decay=0.1)
    # the paper's 120k iterations: 80k and 100k
    steps = (79_999, 80_000, 99_999, 100_000)
    assert [schedule.factor(step, 120_000) for step in steps] == pytest.approx([1, 0.1, 0.1, 0.01])


def test_cosine_starts_after_the_warmup_is_half_in_the_middle_and_ends_at_final() -> None:
    schedule = WarmupSchedule(kind="cosine", warmup_steps=10, final=0.0)
    assert schedule.factor(10, 110) == pytest.approx(1.0)
    assert schedule.factor(35, 110) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert schedule.factor(60, 110) == pytest.approx(0.5)
    assert schedule.factor(110, 110) == pytest.approx(0.0)
    assert WarmupSchedule(kind="cosine", warmup_steps=0, final=0.2).factor(200, 100) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("name", "value"),
    [("warmup_steps", -1), ("warmup_start", 0.0), ("decay", 1.5), ("final", -0.1), ("milestones", (0.9, 0.3))],
)
def test_values_out_of_range_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"model.schedule.{name}"):
        WarmupSchedule(**{name: value})

"""The learning rate over a run: a linear warm-up, then steps, a cosine, or nothing."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from onestage.errors import ConfigError


@dataclass(frozen=True)
class WarmupSchedule:
    """A factor on the optimizer's learning rate, a function of the optimizer step.

    The first steps of a detector see box targets that its random heads are far from; a warm-up keeps SGD with momentum
    from throwing the backbone away in them (arXiv:1706.02677, section 2.2).

    Args:
        kind: `step` multiplies by `decay` at every milestone; `cosine` goes from 1 to `final` along half a cosine
            (arXiv:1608.03983, eq. 5, without restarts); `constant` does nothing after the warm-up.
        warmup_steps: optimizer steps of linear warm-up, 0 for none.
        warmup_start: factor at step 0, in (0, 1].
        milestones: for `step`, as shares of the whole run in (0, 1), so that a shorter run keeps its shape.
            The SSD paper's 80k and 100k of 120k iterations are 2/3 and 5/6.
        decay: for `step`, the factor at every milestone, in (0, 1].
        final: for `cosine`, the factor at the last step, in [0, 1].
    """

    kind: Literal["step", "cosine", "constant"] = "step"
    warmup_steps: int = 1000
    warmup_start: float = 0.001
    milestones: Sequence[float] = field(default=(2 / 3, 5 / 6))
    decay: float = 0.1
    final: float = 0.0

    def __post_init__(self) -> None:
        _require("warmup_steps", self.warmup_steps, self.warmup_steps >= 0, "0 or more")
        _require("warmup_start", self.warmup_start, 0 < self.warmup_start <= 1, "in (0, 1]")
        _require("decay", self.decay, 0 < self.decay <= 1, "in (0, 1]")
        _require("final", self.final, 0 <= self.final <= 1, "in [0, 1]")
        in_order = list(self.milestones) == sorted(self.milestones)
        inside = all(0 < milestone < 1 for milestone in self.milestones)
        _require("milestones", list(self.milestones), in_order and inside, "shares of the run in (0, 1), ascending")

    @property
    def needs_total_steps(self) -> bool:
        """Whether the factor after the warm-up depends on the length of the run."""
        return self.kind != "constant"

    def factor(self, step: int, total_steps: float) -> float:
        """Return the factor for optimizer step `step` (0 is the first) of a run of `total_steps`."""
        if step < self.warmup_steps:
            return self.warmup_start + (1 - self.warmup_start) * step / self.warmup_steps
        if self.kind == "step":
            return float(self.decay ** sum(step >= milestone * total_steps for milestone in self.milestones))
        if self.kind == "cosine":
            progress = min(1.0, (step - self.warmup_steps) / max(1, total_steps - self.warmup_steps))
            return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * progress))
        return 1.0


def _require(name: str, value: object, holds: bool, rule: str) -> None:
    if not holds:
        raise ConfigError(f"model.schedule.{name} is {value!r}; it must be {rule}.")

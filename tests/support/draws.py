"""Random numbers that a test chooses."""

import numpy as np


class FixedDraws:
    """Stands in for numpy's generator: hands out the given numbers."""

    def __init__(self, *draws: float) -> None:
        self.draws = list(draws)

    def random(self, size: int) -> np.ndarray:
        taken, self.draws = self.draws[:size], self.draws[size:]
        return np.array(taken)

    def beta(self, a: float, b: float) -> float:
        return self.draws.pop(0)

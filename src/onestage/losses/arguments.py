"""Checks of what several losses take. NaN and infinity satisfy none of them."""

from onestage.errors import ConfigError

# Of gamma. An even guess then counts 1e-30, and the products with smaller ones leave the range of float32.
LARGEST_GAMMA = 100.0


def require_focal_arguments(name: str, alpha: float | None, gamma: float, label_smoothing: float) -> None:
    """Check what the members of the family share.

    Raises:
        ConfigError: if an argument is out of its range.
    """
    if alpha is not None and not 0 <= alpha <= 1:
        raise ConfigError(
            f"{name}: alpha is {alpha}; the weight of positives lies in 0..1.\n"
            "RetinaNet's is alpha: 0.25; alpha: null weighs positives and negatives alike"
        )
    require_gamma(name, gamma)
    require_smoothing(name, label_smoothing)


def require_gamma(name: str, gamma: float) -> None:
    """Check how much less easy examples count.

    Raises:
        ConfigError: unless it lies in 0..LARGEST_GAMMA.
    """
    if not 0 <= gamma <= LARGEST_GAMMA:
        raise ConfigError(
            f"{name}: gamma is {gamma}; it must be at least 0, and at most {LARGEST_GAMMA:g}, where hardly anything "
            "counts any more.\nRetinaNet's is gamma: 2.0; gamma: 0.0 is cross-entropy"
        )


def require_smoothing(name: str, label_smoothing: float) -> None:
    """Check a share of doubt.

    Raises:
        ConfigError: unless it lies in 0..1, without 1.
    """
    if not 0 <= label_smoothing < 1:
        raise ConfigError(
            f"{name}: label_smoothing is {label_smoothing}; the share of doubt lies in 0..1, without 1.\n"
            "The usual one is label_smoothing: 0.1; label_smoothing: 0.0 is none"
        )


def require_count(name: str, value: int, minimum: int, remedy: str) -> None:
    """Check a number of anchors.

    Raises:
        ConfigError: unless it is whole and at least `minimum`.
    """
    if not (isinstance(value, int) and value >= minimum):
        raise ConfigError(f"{name} is {value}; it must be a whole number, at least {minimum}.\n{remedy}")

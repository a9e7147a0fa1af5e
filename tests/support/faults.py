"""Functions that fail."""

from collections.abc import Callable


def fail_with(error: BaseException) -> Callable[..., None]:
    """Return a function that raises."""

    def action(*_: object, **__: object) -> None:
        raise error

    return action

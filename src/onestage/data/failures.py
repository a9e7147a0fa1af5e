"""Images that failed in training: what the workers say about them, and what the run does about it."""

import logging
from collections.abc import Sequence
from typing import NamedTuple

from onestage.errors import DataError

NUM_QUOTED = 3  # images that a report quotes

logger = logging.getLogger(__name__)


class Failure(NamedTuple):
    """An image that could not be read, so that another took its place."""

    image_index: int  # row of the AnnotationSet
    message: str


class FailureLog:
    """Counts, in the process that trains, what its workers could not read.

    Args:
        source: the split, for messages.
        num_images: of the split.
        max_bad_fraction: the share of them that may fail before the run is stopped.
    """

    def __init__(self, source: str, num_images: int, max_bad_fraction: float) -> None:
        self.source = source
        self.num_images = num_images
        self.max_bad_fraction = max_bad_fraction
        self._messages: dict[int, str] = {}  # of all epochs, by image
        self._num_replaced = 0  # in this epoch; an image may be asked for more than once

    def add(self, failures: Sequence[Failure]) -> None:
        """Take note of what failed in a batch. The first failure of each image is told at once.

        Raises:
            DataError: more of the images have failed than may.
        """
        for image_index, message in failures:
            self._num_replaced += 1
            if image_index not in self._messages:
                if len(self._messages) < NUM_QUOTED:
                    logger.warning("an image was left out and another took its place: %s", message)
                self._messages[image_index] = message
        limit = self.max_bad_fraction * self.num_images
        if failures and len(self._messages) > limit:
            raise DataError(
                f"{self.source}: {len(self._messages)} of {self.num_images} images could not be read, more than "
                f"data.max_bad_fraction ({self.max_bad_fraction:g}) allows:\n  {self._quoted()}\n"
                "Repair or remove them, or raise data.max_bad_fraction."
            )

    def end_epoch(self, epoch: int) -> None:
        """Report what the epoch left out, if anything, and begin to count anew."""
        num_replaced, self._num_replaced = self._num_replaced, 0
        if num_replaced:
            logger.warning(
                "epoch %d: %d times an image could not be read and another took its place; so far %d of the %d images "
                "of %s have failed:\n  %s",
                epoch,
                num_replaced,
                len(self._messages),
                self.num_images,
                self.source,
                self._quoted(),
            )

    def _quoted(self) -> str:
        lines = [message.partition("\n")[0] for message in list(self._messages.values())[:NUM_QUOTED]]
        more = len(self._messages) - len(lines)
        return "\n  ".join([*lines, *([f"and {more} more"] if more else [])])

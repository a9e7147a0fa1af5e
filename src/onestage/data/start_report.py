"""What a training says about its data before it starts."""

import logging

import numpy as np
import numpy.typing as npt
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from onestage.data.annotations import find_same_files, start_messages
from onestage.types import AnnotationSet

logger = logging.getLogger(__name__)


@rank_zero_only
def report_skipped(annotations: AnnotationSet) -> None:
    """Warn, on one process, about what was left out of a split."""
    for message in start_messages(annotations):
        logger.warning(message)


@rank_zero_only
def report_sampling(annotations: AnnotationSet, repeats: npt.NDArray[np.float64]) -> None:
    """Say, on one process, how long an epoch gets; warn where `data.sampling` changes nothing.

    Args:
        annotations: the training split, N images.
        repeats: [N] how many times an epoch shows each, on average.
    """
    if np.allclose(repeats, 1):
        logger.warning(
            "data.sampling shows every image once, as without it: no class of %s is rare enough.\n"
            "Raise its threshold, or leave data.sampling out.",
            annotations.source,
        )
        return
    counts = f"{repeats.sum():.0f} images of {len(repeats)}, one of them up to {repeats.max():.1f} times"
    rank_zero_info(f"data.sampling: an epoch shows {counts}")


@rank_zero_only
def report_shared_images(train: AnnotationSet, val: AnnotationSet) -> None:
    """Warn, on one process, when training and validation look at the same files; to overfit on purpose is allowed."""
    for finding in find_same_files([("training", train), ("validation", val)])[0]:
        logger.warning("%s", finding.line)

"""What a training says about its data before it starts."""

import logging

from lightning.pytorch.utilities import rank_zero_only

from onestage.data.findings import start_messages
from onestage.types import AnnotationSet

logger = logging.getLogger(__name__)


@rank_zero_only
def report_skipped(annotations: AnnotationSet) -> None:
    """Warn, on one process, about what was left out of a split."""
    for message in start_messages(annotations):
        logger.warning(message)

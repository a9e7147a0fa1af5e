"""What the classification loss is made of: how much of it comes from objects, from easy background, from hard."""

import math
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from torch import Tensor

from onestage.training.module import DetectionModule
from onestage.types import BACKGROUND, IGNORE, AnchorLosses, Batch, Predictions

EASY = 0.9  # p_t of a negative above which it is easy: gamma 2 takes 99% of its loss away
LOWEST_BACKGROUND = 0.8  # mean p_t of negatives before training: 0.96 and more with a prior of 0.01, up to 0.54 without
QUANTITIES = (
    "positives",
    "negatives",
    "ignored",
    "loss_of_positives",
    "loss_of_easy_negatives",
    "loss_of_hard_negatives",
    "p_t_of_positives",
)


class AnchorMonitor(Callback):
    """Logs `anchors/*` at every step that is logged, and looks at the first batch for a missing prior bias.

    Of the first process's batch; at the steps between it does nothing. A detector without `anchor_losses` is left out.
    """

    def __init__(self) -> None:
        self._is_first_batch = False
        self._logged_step = -1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the first batch for the untrained detector's, unless the run goes on from a checkpoint."""
        self._is_first_batch = trainer.global_step == 0

    @rank_zero_only
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the composition of the loss of this batch."""
        # The step that LearningRateMonitor counts, so that both stand in one row; of its batches, the first.
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        is_logged = bool(trainer.loggers) and trainer._logger_connector.should_update_logs
        is_logged = is_logged and step != self._logged_step
        if not (is_logged or self._is_first_batch):
            return
        predictions = _detached(outputs["predictions"])
        detector = cast(DetectionModule, pl_module).detector
        anchor_losses = detector.anchor_losses(predictions, cast(Batch, batch).targets)
        if anchor_losses is None:
            return
        if self._is_first_batch:
            self._is_first_batch = False
            warning = missing_prior(anchor_losses)
            if warning is not None:
                rank_zero_warn(warning)
        if is_logged:
            statistics = anchor_statistics(anchor_losses, predictions.anchors.strides)
            self._logged_step = step
            for logger in trainer.loggers:
                logger.log_metrics(statistics, step=step)


def _detached(predictions: Predictions) -> Predictions:
    """Cut off the gradient, by which a loss that follows the training knows the batches it has to count."""
    tensors: dict[str, Any] = {
        name: value.detach() for name, value in predictions._asdict().items() if isinstance(value, Tensor)
    }
    return predictions._replace(**tensors)


@torch.no_grad()
def anchor_statistics(anchor_losses: AnchorLosses, strides: Tensor) -> dict[str, float]:
    """Count and weigh the anchors of a batch, of all levels together and of each one. Waits for the device once.

    Args:
        anchor_losses: of the batch.
        strides: [A], px; they tell the levels apart.

    Returns:
        `anchors/<quantity>` and `anchors/stride_<px>/<quantity>`. The counts are of anchors in the batch. `loss_of_*`
        are shares of the batch's whole classification loss, 0..1, so that those of the levels add up to the total's.
        `p_t_of_positives` is a mean, 0..1. What is undefined, as the p_t of no positives, is left out.
    """
    labels, losses, p_t = anchor_losses
    is_positive, is_negative = labels >= 0, labels == BACKGROUND
    is_easy = is_negative & (p_t > EASY)
    parts = (is_positive, is_easy, is_negative & ~is_easy)
    counts = [mask.float() for mask in (is_positive, is_negative, labels == IGNORE)]
    sums = [torch.where(mask, losses.float(), 0.0) for mask in parts] + [torch.where(is_positive, p_t.float(), 0.0)]
    per_anchor = torch.stack([values.sum(dim=0) for values in counts + sums])  # [7, A]

    levels = torch.unique(strides)
    groups = torch.cat([torch.ones_like(strides, dtype=torch.bool)[None], strides == levels[:, None]])  # [1 + L, A]
    values = torch.where(groups[:, None], per_anchor, 0.0).sum(dim=-1)  # [1 + L, 7]
    loss, num_positives = values[:1, 3:6].sum(), values[:, :1]
    values = torch.cat([values[:, :3], values[:, 3:6] / loss, values[:, 6:] / num_positives], dim=1)
    places = ["anchors", *(f"anchors/stride_{stride:g}" for stride in levels.tolist())]
    return {
        f"{place}/{quantity}": value
        for place, row in zip(places, values.tolist(), strict=True)
        for quantity, value in zip(QUANTITIES, row, strict=True)
        if math.isfinite(value)
    }


@torch.no_grad()
def missing_prior(anchor_losses: AnchorLosses) -> str | None:
    """Return a warning if the first loss is that of a head whose background does not start likely, else None.

    RetinaNet section 4.1 (arXiv:1708.02002): a loss over all anchors starts with the background of all of them, which
    drowns the objects unless it scores low. What tells is the background's mean p_t, and not the size of the loss,
    which alpha, gamma and the number of anchors move by powers of ten. A loss that picks a few negatives for each
    positive, as hard negative mining does, needs no prior.

    Args:
        anchor_losses: of the first batch of an untrained detector.
    """
    labels, losses, p_t = anchor_losses
    is_positive, is_negative = labels >= 0, labels == BACKGROUND
    num_positives, num_negatives = int(is_positive.sum()), int(is_negative.sum())
    num_counted = int((is_negative & (losses > 0)).sum())
    background = float(p_t[is_negative].mean()) if num_negatives else 1.0
    if num_counted <= num_negatives / 2 or background >= LOWEST_BACKGROUND:
        return None
    loss_per_positive = float(losses.sum()) / max(1, num_positives)
    share = float(losses[is_negative].sum() / losses.sum())
    return (
        f"The first classification loss is {loss_per_positive:,.4g} for each positive anchor, {share:.1%} of it from "
        f"{num_counted:,} background anchors: the untrained detector gives the background a probability of "
        f"{background:.2f} on average, where a prior of 0.01 gives 0.96 or more. The objects drown in it.\n"
        "Set the detector's prior to 0.01 (model.detector.init_args.prior); a head of your own starts its biases at "
        "classification_loss.prior_bias(num_classes, prior)."
    )

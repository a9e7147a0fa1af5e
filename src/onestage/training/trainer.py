"""Lightning's trainer with the settings a detector needs decided."""

from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse.typing import NonNegativeFloat
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities import rank_zero_info

from onestage.evaluation.loss_curves import FIGURE_GAMMAS, LossDistribution
from onestage.training.combinations import check_launcher, check_processes, check_values
from onestage.training.loss_collector import LossCollector, report_losses
from onestage.training.module import DetectionModule
from onestage.training.precision import DecidedPrecision, Precision, choose_precision


class DetectionTrainer(Trainer):
    """Lightning's Trainer; every other argument is Lightning's own.

    The limits are repeated here for their types. Lightning writes them Optional[Union[int, float]], and typing keeps
    one object for both orders of a Union, the one that any module made first: `--trainer.limit_val_batches 1` would
    become 1.0, all batches instead of one. `int | float` keeps its order.

    Args:
        args: Lightning's.
        precision: `auto` takes what is faster on the device at hand, and says what that is.
        use_distributed_sampler: stays false. The data module's samplers shard exactly; Lightning's would pad the
            evaluation with duplicates.
        limit_train_batches: batches of an epoch: an int counts them, a float is their share, 0..1.
        limit_val_batches: likewise, of a validation.
        limit_test_batches: likewise, of a test.
        limit_predict_batches: likewise, of a prediction.
        overfit_batches: likewise, of both training and validation.
        val_check_interval: between validations: steps, a share of an epoch, or a time as Lightning reads it.
        sync_batchnorm: normalise by the images of all processes, for models with batch norm, on GPUs.
        kwargs: Lightning's.
    """

    def __init__(
        self,
        *args: Any,
        precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"] = "auto",
        use_distributed_sampler: Literal[False] = False,
        limit_train_batches: int | float | None = None,
        limit_val_batches: int | float | None = None,
        limit_test_batches: int | float | None = None,
        limit_predict_batches: int | float | None = None,
        overfit_batches: int | float = 0.0,
        val_check_interval: int | float | str | timedelta | dict[str, int] | None = None,
        sync_batchnorm: bool = False,
        **kwargs: Any,
    ) -> None:
        self.sync_batchnorm = sync_batchnorm
        accelerator = kwargs.get("accelerator", "auto")
        decided: DecidedPrecision | None = resolve_precision(precision, accelerator)
        if decided == "16-mixed" and _device(accelerator) == "cpu":
            # Lightning would compute in bf16 instead. torch can do it, slowly: to try out what a GPU will do.
            given = kwargs.get("plugins") or []
            given = given if isinstance(given, list) else [given]
            decided, kwargs["plugins"] = None, [*given, MixedPrecision("16-mixed", "cpu")]
        super().__init__(
            *args,
            precision=decided,
            use_distributed_sampler=use_distributed_sampler,
            limit_train_batches=limit_train_batches,
            limit_val_batches=limit_val_batches,
            limit_test_batches=limit_test_batches,
            limit_predict_batches=limit_predict_batches,
            overfit_batches=overfit_batches,
            val_check_interval=val_check_interval,
            sync_batchnorm=sync_batchnorm,
            **kwargs,
        )
        check_values(self)
        check_launcher(self)
        check_processes(self)

    def losses(
        self,
        model: DetectionModule,
        datamodule: LightningDataModule,
        ckpt_path: str | None = None,
        split: Literal["val", "test"] = "val",
        gammas: list[NonNegativeFloat] | None = None,
    ) -> None:
        """Write how unequally the anchors share the classification loss, as RetinaNet's figure 4: a table and curves.

        Args:
            model: with the weights to look at.
            datamodule: the data.
            ckpt_path: of the checkpoint; the command reads it before this is called.
            split: the images to look at.
            gammas: of the focal loss, each at least 0. null: 0, 0.5, 1, 2 and 5.
        """
        distribution = LossDistribution(gammas or FIGURE_GAMMAS)
        collector = LossCollector(model, distribution)
        run = self.validate if split == "val" else self.test
        run(collector, datamodule=datamodule, verbose=False)
        if self.is_global_zero:
            report_losses(Path(self.default_root_dir), distribution, title=str(ckpt_path or "the configured weights"))


def evaluate_at_least_once(settings: Any) -> None:
    """Let a run that is shorter than the interval between validations, as for a first try, end with a number.

    settings: the parsed `trainer` group.
    """
    if settings.max_epochs is not None and settings.max_epochs > 0 and settings.check_val_every_n_epoch is not None:
        settings.check_val_every_n_epoch = min(settings.check_val_every_n_epoch, settings.max_epochs)


def resolve_precision(precision: Precision, accelerator: object) -> DecidedPrecision:
    """Replace `auto` by the faster precision of the accelerator, and say so once."""
    if precision != "auto":
        return precision
    decided, reason = choose_precision(_device(accelerator))
    rank_zero_info(f"precision: {decided} ({reason}); trainer.precision decides otherwise")
    return decided


def _device(accelerator: object) -> str:
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return "cuda"
    if accelerator in ("auto", "gpu", "mps") and torch.backends.mps.is_available():
        return "mps"
    return "cpu" if accelerator in ("auto", "cpu") else str(accelerator)

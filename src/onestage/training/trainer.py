"""Lightning's trainer with the settings a detector needs decided."""

from typing import Any, Literal

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info

from onestage.training.precision import DecidedPrecision, Precision, choose_precision


class DetectionTrainer(Trainer):
    """Lightning's Trainer; every other argument is Lightning's own.

    Args:
        args: Lightning's.
        precision: `auto` takes what is faster on the device at hand, and says what that is.
        use_distributed_sampler: stays false. The data module's samplers shard exactly; Lightning's would pad the
            evaluation with duplicates.
        kwargs: Lightning's.
    """

    def __init__(
        self,
        *args: Any,
        precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"] = "auto",
        use_distributed_sampler: Literal[False] = False,
        **kwargs: Any,
    ) -> None:
        decided = resolve_precision(precision, kwargs.get("accelerator", "auto"))
        super().__init__(*args, precision=decided, use_distributed_sampler=use_distributed_sampler, **kwargs)


def resolve_precision(precision: Precision, accelerator: object) -> DecidedPrecision:
    """Replace `auto` by the faster precision of the accelerator, and say so once."""
    if precision != "auto":
        return precision
    decided, reason = choose_precision(_device(accelerator))
    rank_zero_info(f"precision: {decided} ({reason}); trainer.precision decides otherwise")
    return decided


def _device(accelerator: object) -> str:
    import torch

    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return "cuda"
    if accelerator in ("auto", "gpu", "mps") and torch.backends.mps.is_available():
        return "mps"
    return "cpu" if accelerator in ("auto", "cpu") else str(accelerator)

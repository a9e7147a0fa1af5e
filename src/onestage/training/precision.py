"""Which number format a run computes in when nobody says so."""

from typing import Literal

import torch

DecidedPrecision = Literal["32-true", "bf16-mixed", "16-mixed"]
Precision = Literal["auto"] | DecidedPrecision


def choose_precision(device: str) -> tuple[DecidedPrecision, str]:
    """Return the faster precision of the device at hand, and the reason in words.

    Decided by what the device has instructions for and not by a stopwatch, so that two runs on one machine agree.
    For the stopwatch: python scripts/benchmark.py step.

    Args:
        device: what will train, `cpu`, `cuda` or another.
    """
    if device == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16-mixed", "the GPU computes in bf16"
        return "16-mixed", "the GPU has no bf16, so fp16 with a loss scaler"
    if device == "cpu":
        return _choose_on_cpu()
    return "32-true", f"nothing else was tried on {device}"


def _choose_on_cpu() -> tuple[DecidedPrecision, str]:
    # Where the CPU has them, a training step of SSD300 is twice as fast in bf16; where it has not, oneDNN emulates bf16
    # and the step is slower than in fp32.
    capabilities = torch.cpu.get_capabilities()
    for instructions in ("amx_bf16", "avx512_bf16"):
        if capabilities.get(instructions):
            return "bf16-mixed", f"this CPU has {instructions}"
    return "32-true", "this CPU has no instructions for bf16"

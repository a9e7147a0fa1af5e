"""FSDP on CPUs, which torch can do and Lightning refuses: to test with processes what is meant for GPUs."""

import torch
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel


class CPUFSDP(FSDPStrategy):
    """Lightning's strategy, but for the number that it takes for the device: a CPU has none."""

    def _setup_model(self, model: nn.Module) -> FullyShardedDataParallel:
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)

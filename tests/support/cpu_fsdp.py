"""FSDP on CPUs, which torch supports and Lightning refuses, to test it with processes."""

import torch
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel


class CPUFSDP(FSDPStrategy):
    """Lightning's strategy with a CPU as device, which has no index."""

    def _setup_model(self, model: nn.Module) -> FullyShardedDataParallel:
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)

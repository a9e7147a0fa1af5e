import pytest
from cpu_fsdp import CPUFSDP
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy

from onestage.reliability.add_on import writes_whole_files


@pytest.mark.parametrize(
    ("strategy", "whole"),
    [
        (None, True),
        ("auto", True),
        ("ddp", True),
        (DDPStrategy(), True),
        ("fsdp", True),
        ("fsdp_cpu_offload", True),
        (FSDPStrategy(), True),
        (CPUFSDP(), True),
        (FSDPStrategy(state_dict_type="sharded"), False),
        (ModelParallelStrategy(), False),
        ("deepspeed_stage_2", False),
    ],
)
def test_one_process_writes_a_checkpoint_unless_the_strategy_writes_it_in_parts(strategy: object, whole: bool) -> None:
    """Where it does, it is written beside its target, so that a kill or a full disk leaves the one before it whole."""
    assert writes_whole_files(strategy) == whole

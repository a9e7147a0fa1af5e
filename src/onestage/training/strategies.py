"""What Lightning's strategies do to a model, as far as the rest of training has to know."""

from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy


def shards_parameters(strategy: Strategy) -> bool:
    """Say whether a process holds only its part of each parameter, and not the model as it is written down."""
    return isinstance(strategy, FSDPStrategy | DeepSpeedStrategy | ModelParallelStrategy)


def clips_by_itself(strategy: Strategy) -> bool:
    """Say whether the strategy has been told `trainer.gradient_clip_val` and clips inside its own step."""
    return isinstance(strategy, DeepSpeedStrategy)


def writes_whole_files(strategy: object) -> bool:
    """Say whether the strategy leaves the writing of a checkpoint to one process: the others write parts in folders.

    strategy: as configured, a name or an object. FSDP gathers the weights in one file, unless it is told not to.
    """
    name = strategy if isinstance(strategy, str) else type(strategy).__name__
    in_parts = getattr(strategy, "_state_dict_type", "full") == "sharded"
    return not in_parts and not any(word in name.lower() for word in ("deepspeed", "modelparallel"))

"""What Lightning's strategies do to a model, as far as the rest of training has to know."""

from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy


def shards_parameters(strategy: Strategy) -> bool:
    """Say whether a process holds only its part of each parameter, and not the model as it is written down."""
    return isinstance(strategy, FSDPStrategy | DeepSpeedStrategy | ModelParallelStrategy)


def clips_by_itself(strategy: Strategy) -> bool:
    """Say whether the strategy has been told `trainer.gradient_clip_val` and clips inside its own step."""
    return isinstance(strategy, DeepSpeedStrategy)

"""Search the settings of a training."""

"""The training loop around any detector and any data module: Lightning module, schedule, checkpoints, monitors."""

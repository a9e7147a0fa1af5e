"""Crash safety: checkpoints, exact resume, signals, non-finite values, watchdog."""

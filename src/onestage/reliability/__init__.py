"""Crash safety: checkpoints, exact resume, signals, non-finite values and the watchdog."""

"""The parts of compare_losses.py: which runs, how each is made, what they say together, and the page about it."""

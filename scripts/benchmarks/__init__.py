"""Each part of the package beside the obvious alternative: timed in turn, and checked to give the same result."""

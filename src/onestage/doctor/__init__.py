"""Check a data set and fit anchors to it."""

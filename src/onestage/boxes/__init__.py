"""Pure tensor geometry: anchors, box coders, matchers and post-processing. No weights, no files."""

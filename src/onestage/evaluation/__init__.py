"""Exact COCO numbers, drawn detections and the results file. Knows boxes, not models, and not Lightning."""

"""Exact COCO metrics, drawn detections and the results file."""

"""Convert data sets between COCO, VOC and YOLO."""

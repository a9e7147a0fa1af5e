"""Size and speed of the detectors of `configs/`, as CSV: random weights, one image on the configuration's canvas.

FLOPs are multiplications plus additions of `forward`. The speed is of `forward` and `detect` in fp32. Random weights
give many scores above the threshold, so suppression has more work than after training.
"""

import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from jsonargparse import ArgumentParser
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.timing import time_in_turns
from onestage.types import Detector

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
WEIGHTS = ("weights", "backbone_weights", "pretrained")


class Model(NamedTuple):
    """A row of the table."""

    name: str
    config: str  # file in configs/, or class path
    num_classes: int
    canvas: tuple[int, int]  # (height, width), px
    published: str  # mAP of the publication, its data, and the size where it is another


SHAPES = [
    Model("SSD256", "shapes_ssd.yaml", 6, (256, 256), ""),
    Model("SSD128", "onestage.models.SSD128", 6, (128, 128), ""),
    Model("SSD160", "shapes_ssd160.yaml", 6, (160, 160), ""),
    Model("RetinaNet, small", "shapes_retinanet.yaml", 6, (128, 128), ""),
    Model("YOLOv3, small", "shapes_yolo.yaml", 6, (128, 128), ""),
    Model("YOLOv2, small", "shapes_yolov2.yaml", 6, (128, 128), ""),
]
PUBLISHED = [
    Model("SSD300", "voc_ssd300.yaml", 20, (300, 300), "VOC07 77.2"),
    Model("SSD300", "coco_ssd300.yaml", 80, (300, 300), "COCO 25.1"),
    Model("SSD512", "onestage.models.SSD512", 20, (512, 512), "VOC07 79.8, COCO 28.8"),
    Model("SSDLite320", "onestage.models.SSDLite320", 80, (320, 320), "COCO 21.3 (torchvision)"),
    Model("RetinaNet R18", "voc_retinanet_r18.yaml", 20, (480, 800), "COCO 31.7 (mmdetection)"),
    Model("RetinaNet R50", "coco_retinanet_r50.yaml", 80, (800, 1344), "COCO 36.4 (torchvision)"),
    Model("FCOS R50", "onestage.models.FCOS", 80, (800, 1344), "COCO 39.2 (torchvision)"),
    Model("YOLOv2", "voc_yolov2.yaml", 20, (416, 416), "VOC07 76.8"),
    Model("YOLOv3", "coco_yolov3.yaml", 80, (608, 608), "COCO 33.0"),
]


def run(rounds: int, quick: bool) -> None:
    """Print the table."""
    models = SHAPES if quick else SHAPES + PUBLISHED
    detectors = [build(model).eval() for model in models]
    images = [torch.randint(0, 256, (1, 3, *model.canvas), dtype=torch.uint8) for model in models]

    @torch.inference_mode()
    def detect(index: int) -> None:
        detectors[index].detect(detectors[index](images[index]))

    contestants = {str(index): lambda index=index: detect(index) for index in range(len(models))}
    # On one thread CPU seconds, which other programs hardly disturb.
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds = time_in_turns(contestants, rounds, clock=clock)
    print("model,config,classes,height,width,parameters,gflops,images_per_second,published_map")
    for index, model in enumerate(models):
        num_parameters = sum(parameter.numel() for parameter in detectors[index].parameters())
        speed = 1 / statistics.median(seconds[str(index)])
        columns = (model.name, model.config, model.num_classes, *model.canvas, num_parameters)
        row = (*columns, f"{count_flops(model) / 1e9:.2f}", f"{speed:.2f}", model.published)
        print(",".join(f'"{value}"' if "," in str(value) else str(value) for value in row))
    print(f"{torch.get_num_threads()} threads, {rounds} rounds")


def build(model: Model) -> Detector:
    """Return the detector of a configuration with random weights."""
    written: dict[str, Any] = {"class_path": model.config}
    if model.config.endswith(".yaml"):
        written = yaml.safe_load((CONFIGS / model.config).read_text(encoding="utf-8"))["model"]["detector"]
    arguments = _without_weights(written.get("init_args", {})) | {"num_classes": model.num_classes}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Detector, "detector")
    settings = parser.parse_object({"detector": {**written, "init_args": arguments}})
    detector: Detector = parser.instantiate_classes(settings).detector
    return detector


def count_flops(model: Model) -> int:
    """Return the multiplications and additions of one image; computes nothing."""
    with torch.device("meta"):
        detector = build(model).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            detector(torch.zeros(1, 3, *model.canvas, dtype=torch.uint8))
    return counter.get_total_flops()


def _without_weights(arguments: dict[str, Any]) -> dict[str, Any]:
    """Drop the keys of published weights, which a benchmark does not fetch."""
    return {
        key: _without_weights(value) if isinstance(value, dict) else value
        for key, value in arguments.items()
        if key not in WEIGHTS
    }

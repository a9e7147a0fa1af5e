"""Coverage of boxes by a detector's anchors, and anchors that cover them better."""

import sys
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import yaml
from torch import Tensor
from torch.nn.functional import pad
from torchvision.ops import box_convert

from onestage.boxes.anchors import AnchorGrid, AnchorShapes
from onestage.boxes.geometry import paired_iou, pairwise_overlap
from onestage.doctor.statistics import SIDES, canvas_boxes, size_bin
from onestage.errors import ConfigError, DataError, require
from onestage.files import printable, read_file
from onestage.models.detector import AnchorDetector
from onestage.types import AnnotationSet, Detector

POSITIVE_IOU = 0.5  # of a positive anchor
POOR_IOU = 0.3  # a head hardly sees a box whose best anchor overlaps it by less
BLOCK_ROWS = 1 << 14  # boxes whose IoUs are computed at once, in the cache of a core
COUNTED_BOXES = 2_000  # evenly spaced boxes whose positive anchors are counted, 64 at a time
FITTED_BOXES = 4_000  # boxes, drawn with a fixed seed, that anchors are fitted to; all boxes measure the result
MAX_ROUNDS = 100  # of k-means
STEPS = (1.25, 1.1, 1.04)  # factors of width and height that the fit tries
MIN_SIDE = 4.0  # px, of a fitted anchor
MIN_GAIN = 1e-4  # of the fitness per accepted change
MEAN_WEIGHT = 0.2  # of the mean IoU in the fitness, beside the fraction of reached boxes
MAX_TABLE_BYTES = 1 << 20


class DetectorAnchors(NamedTuple):
    """The anchors of a detector for one canvas."""

    class_path: str
    image_size: int  # side of the square canvas, px
    levels: tuple[AnchorShapes, ...]  # empty for a detector without anchors
    grids: tuple[tuple[int, int], ...]  # (rows, columns) of each level
    max_detections: int  # per image

    @property
    def detector(self) -> str:
        """Return the class name."""
        return self.class_path.rpartition(".")[2]


class Coverage(NamedTuple):
    """How well anchors fit the boxes of a data set."""

    share: float  # of boxes whose best anchor has IoU >= 0.5
    poor_share: float  # of boxes whose best anchor has IoU < 0.3; it is positive all the same
    mean_best_iou: float
    by_size: list[float]  # share per bin of `SIDES`; NaN without boxes
    by_class: list[float]  # share per label; NaN without boxes
    positives_per_object: float  # positive anchors of one object, at least its forced match
    num_unreached: int  # boxes with only their forced match


def find_anchors(
    detector: str, table: str | tuple[AnchorShapes, ...] | None = None, image_size: int | None = None
) -> DetectorAnchors:
    """Return the anchors of a detector class; ConfigError if class, table or canvas cannot be used.

    Args:
        detector: class path; a name without dots is a class of onestage.models.
        table: value of the class's argument `anchors`, or a YAML file that `onestage anchors` wrote; None: its default.
        image_size: side of the canvas, px; None: the only one that the detector takes.
    """
    class_path = detector if "." in detector else f"onestage.models.{detector}"
    if isinstance(table, str) and table.endswith((".yaml", ".yml")):
        table = _read_table(table)
    module, _, name = class_path.rpartition(".")
    try:
        detector_class = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as reason:
        raise ConfigError(f"detector: {class_path} cannot be imported ({reason}).\nTry: --detector SSD300") from None
    is_detector = isinstance(detector_class, type) and issubclass(detector_class, Detector)
    require(is_detector, "detector", class_path, "the path of a Detector class", "Try: --detector SSD300")
    arguments = {} if table is None else {"anchors": list(table) if isinstance(table, tuple) else table}
    try:
        with torch.device("meta"):  # only the shapes of its tensors matter
            built = detector_class(num_classes=1, **arguments)
    except (TypeError, RuntimeError) as reason:
        problem = f"detector: {class_path} cannot be built with {' and '.join(['num_classes', *arguments])} ({reason})."
        raise ConfigError(f"{problem}\nTry a detector that takes anchors: --detector RetinaNet") from None
    side = image_size or built.image_size
    remedy = f"{name} takes images of any size. Try: --image_size 512"
    require(side is not None and side > 0, "image_size", side, "> 0", remedy)
    built.require_canvas((side, side))
    if not isinstance(built, AnchorDetector):
        return DetectorAnchors(class_path, side, (), (), sys.maxsize)
    levels, grids = built.anchor_summary((side, side))
    return DetectorAnchors(class_path, side, levels, grids, built.selection.max_detections)


def measure_coverage(
    boxes: npt.NDArray[np.float64], labels: npt.NDArray[np.int64], num_classes: int, anchors: DetectorAnchors
) -> Coverage:
    """Measure how well anchors fit boxes [T, 4] xyxy in pixels of the canvas, T >= 1, with labels [T] in [0, K)."""
    best = best_ious(torch.from_numpy(boxes).float(), anchors).numpy()
    is_reached = best >= POSITIVE_IOU
    rows = np.unique(np.linspace(0, len(boxes) - 1, min(len(boxes), COUNTED_BOXES)).round().astype(np.int64))
    num_positives = count_positives(torch.from_numpy(boxes[rows]), anchors)
    return Coverage(
        share=float(is_reached.mean()),
        poor_share=float((best < POOR_IOU).mean()),
        mean_best_iou=float(best.mean()),
        by_size=_shares(is_reached, size_bin(boxes), len(SIDES) + 1),
        by_class=_shares(is_reached, labels, num_classes),
        positives_per_object=float(num_positives.clamp(min=1).double().mean()),
        num_unreached=int(np.count_nonzero(~is_reached)),
    )


def best_ious(boxes: Tensor, anchors: DetectorAnchors) -> Tensor:
    """Return the IoU of each box with its best anchor, [T]. boxes: [T, 4] xyxy."""
    best = []
    for part in torch.split(boxes, BLOCK_ROWS):
        levels = zip(anchors.levels, anchors.grids, strict=True)
        ious = [_nearest_ious(part, level, grid, part.new_tensor(level.shapes)) for level, grid in levels]
        best.append(torch.cat(ious).amax(dim=0))
    return torch.cat(best)


def count_positives(boxes: Tensor, anchors: DetectorAnchors) -> Tensor:
    """Return how many anchors have IoU >= 0.5 with each box, [T]. boxes: [T, 4] xyxy."""
    placed = box_convert(AnchorGrid(anchors.levels)(anchors.grids).boxes, "cxcywh", "xyxy")
    ious = (pairwise_overlap(part.float(), placed)[1] for part in torch.split(boxes, 64))
    return torch.cat([(iou >= POSITIVE_IOU).sum(dim=1) for iou in ious])


def propose_anchors(boxes: Tensor, anchors: DetectorAnchors) -> DetectorAnchors:
    """Return as many anchors per level that fit the boxes better, or as well. boxes: [T, 4] xyxy, px; T >= 1.

    The fit starts at the detector's anchors, and at the clusters of the boxes' shapes (YOLOv2, arXiv:1612.08242,
    section 2) in the order of their area. Then widths and heights change in small steps while more boxes are reached.
    """
    generator = torch.Generator().manual_seed(0)
    sample = boxes[torch.randperm(len(boxes), generator=generator)[:FITTED_BOXES]].float()
    starts = [torch.tensor([shape for level in anchors.levels for shape in level.shapes])]
    strides = torch.tensor([level.stride for level in anchors.levels for _ in level.shapes])
    clusters = cluster_shapes(sample[:, 2:] - sample[:, :2], len(strides), generator)
    if len(clusters) == len(strides):
        # Anchors narrower than the stride would leave boxes between them.
        factors = strides.clamp(max=anchors.image_size / 2) / clusters.prod(dim=1).sqrt()
        starts.append(clusters * factors.clamp(min=1)[:, None])
    _, shapes = max((_improve(start, anchors, sample) for start in starts), key=lambda fit: fit[0])
    return _with_shapes(anchors, shapes)


def cluster_shapes(sides: Tensor, num_clusters: int, generator: torch.Generator) -> Tensor:
    """Return k-means centres (width, height), [k, 2] px, in the order of their area. sides: [T, 2] of boxes, px, > 0.

    The distance is 1 - IoU of two boxes with the same centre; a centre is the median of its boxes; the start is
    k-means++. There are fewer centres than `num_clusters` if there are fewer different shapes.
    """
    different: Tensor = torch.unique(sides, dim=0)
    centres = different[torch.randint(len(different), (1,), generator=generator)]
    while len(centres) < min(num_clusters, len(different)):
        chances = (1 - _shape_iou(different, centres).amax(dim=1)).clamp(min=1e-6) ** 2
        centres = torch.cat([centres, different[chances.multinomial(1, generator=generator)]])
    owner = torch.full((len(sides),), -1)
    for _ in range(MAX_ROUNDS):
        nearest = _shape_iou(sides, centres).argmax(dim=1)
        if (nearest == owner).all():
            break
        owner = nearest
        for k in torch.unique(owner):
            centres[k] = sides[owner == k].median(dim=0).values
    return centres[centres.prod(dim=1).argsort()]


def propose_shapes(boxes: Tensor, anchors: DetectorAnchors, num_shapes: int) -> DetectorAnchors:
    """Return `num_shapes` clusters of the boxes' shapes, dealt to the levels by area (YOLOv2, section 2).

    boxes: [T, 4] xyxy, px. ConfigError if the levels cannot share the clusters equally, or the shapes are too few.
    """
    num_levels = len(anchors.levels)
    rule, remedy = f"a multiple of {num_levels}, the levels of {anchors.detector}", f"Try: --shapes {3 * num_levels}"
    require(num_shapes >= 1 and num_shapes % num_levels == 0, "shapes", num_shapes, rule, remedy)
    generator = torch.Generator().manual_seed(0)
    sample = boxes[torch.randperm(len(boxes), generator=generator)[:FITTED_BOXES]].float()
    clusters = cluster_shapes(sample[:, 2:] - sample[:, :2], num_shapes, generator)
    require(len(clusters) == num_shapes, "shapes", num_shapes, f"at most {len(clusters)}, the different shapes found")
    return _with_shapes(anchors, clusters.tolist(), num_shapes // num_levels)


def mean_shape_iou(boxes: Tensor, anchors: DetectorAnchors) -> float:
    """Return the mean IoU of boxes [T, 4] xyxy with the best anchor on the same centre: YOLOv2's table 1."""
    shapes = boxes.new_tensor([shape for level in anchors.levels for shape in level.shapes])
    return float(_shape_iou(boxes[:, 2:] - boxes[:, :2], shapes).amax(dim=1).mean())


def compare_anchors(annotations: AnnotationSet, anchors: DetectorAnchors, num_shapes: int | None = None) -> str:
    """Fit anchors to the boxes of a split; return them as YAML, with the coverage before and after as comments.

    num_shapes: of `propose_shapes`; None: `propose_anchors`. DataError if the split holds no box.
    """
    boxes, labels = canvas_boxes(annotations, anchors.image_size)
    if not len(boxes):
        raise DataError(f"{annotations.source}: holds no object to fit anchors to.\nGive the training split.")
    corners = torch.from_numpy(boxes)
    fitted = propose_anchors(corners, anchors) if num_shapes is None else propose_shapes(corners, anchors, num_shapes)
    text = f"# {len(boxes)} boxes of {printable(annotations.source)}\n"
    for name, table in (("before", anchors), ("after", fitted)):
        coverage = measure_coverage(boxes, labels, len(annotations.class_names), table)
        text += (
            f"# {name}: {100 * coverage.share:.1f} % of the boxes have an anchor with IoU >= {POSITIVE_IOU:g}, "
            f"{100 * coverage.poor_share:.1f} % none with IoU >= {POOR_IOU:g}; "
            f"mean best IoU {coverage.mean_best_iou:.3f}, {coverage.positives_per_object:.1f} anchors per object\n"
        )
        if num_shapes is not None:
            text += f"# {name}: mean best shape IoU {mean_shape_iou(corners, table):.3f}\n"
    return text + write_table(fitted)


def write_table(anchors: DetectorAnchors) -> str:
    """Return the anchors as YAML for `onestage fit --config ... --config FILE`."""
    head = f"model:\n  detector:\n    class_path: {anchors.class_path}\n    init_args:\n      anchors:\n"
    rows = ""
    for level in anchors.levels:
        shapes = ", ".join(f"[{width:g}, {height:g}]" for width, height in level.shapes)
        offset = "" if level.offset == AnchorShapes._field_defaults["offset"] else f", offset: {level.offset:g}"
        rows += f"        - {{stride: {level.stride:.8g}, shapes: [{shapes}]{offset}}}\n"
    return head + rows


def _with_shapes(anchors: DetectorAnchors, shapes: list[list[float]], per_level: int | None = None) -> DetectorAnchors:
    """Deal shapes (width, height) to the levels; per_level: to each, None: as many as it has."""
    rounded = iter([(round(width, 2), round(height, 2)) for width, height in shapes])
    rows = [(level, islice(rounded, per_level or len(level.shapes))) for level in anchors.levels]
    return anchors._replace(levels=tuple(level._replace(shapes=tuple(row)) for level, row in rows))


def _read_table(file: str) -> tuple[AnchorShapes, ...]:
    remedy = "Give a file that `onestage anchors` wrote."
    content = read_file(Path(file), ConfigError, "a YAML file of `onestage anchors`", remedy, MAX_TABLE_BYTES)
    try:
        levels = []
        for row in yaml.safe_load(content)["model"]["detector"]["init_args"]["anchors"]:
            shapes = tuple((float(width), float(height)) for width, height in row.pop("shapes"))
            levels.append(AnchorShapes(shapes=shapes, **{key: float(value) for key, value in row.items()}))
        return tuple(levels)
    except (yaml.YAMLError, RecursionError, AttributeError, KeyError, TypeError, ValueError) as reason:
        problem = f"is not an anchor table ({type(reason).__name__}: {str(reason).partition(chr(10))[0][:100]})"
        raise ConfigError(f"{printable(file)}: {problem}.\n{remedy}") from None


def _nearest_ious(boxes: Tensor, level: AnchorShapes, grid: tuple[int, int], shapes: Tensor) -> Tensor:
    """Return the IoU of each box with the anchor of each shape whose centre is nearest, [n, T]. shapes: [n, 2].

    No other anchor of that shape overlaps more, because the overlap along each axis only falls with the distance.
    """
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    last_cell = boxes.new_tensor([grid[1] - 1, grid[0] - 1])
    cells = (centres / level.stride - level.offset).round().clamp(min=0).minimum(last_cell)
    nearest = (cells + level.offset) * level.stride
    half = shapes[:, None] / 2
    return paired_iou(boxes, torch.cat([nearest - half, nearest + half], dim=-1))


def _improve(shapes: Tensor, anchors: DetectorAnchors, boxes: Tensor) -> tuple[float, list[list[float]]]:
    """Scale width and height of one shape at a time while the fitness rises; return fitness and shapes [n, 2]."""
    slots = [(level, grid) for level, grid in zip(anchors.levels, anchors.grids, strict=True) for _ in level.shapes]
    shapes = shapes.clamp(MIN_SIDE, anchors.image_size)
    rows = torch.cat([_nearest_ious(boxes, *slot, shape[None]) for slot, shape in zip(slots, shapes, strict=True)])
    fitness = float(_fitness(rows.amax(dim=0)))
    for step in STEPS:
        factors = torch.cartesian_prod(*[torch.tensor([1 / step, 1, step])] * 2)
        is_better = True
        while is_better:
            is_better = False
            for number, slot in enumerate(slots):
                candidates = (shapes[number] * factors).clamp(MIN_SIDE, anchors.image_size)
                ious = _nearest_ious(boxes, *slot, candidates)
                rows[number] = 0
                gained = _fitness(torch.maximum(ious, rows.amax(dim=0)))
                chosen = int(gained.argmax()) if gained.max() > fitness + MIN_GAIN else len(factors) // 2  # as it is
                is_better |= bool(gained[chosen] > fitness + MIN_GAIN)
                fitness = max(fitness, float(gained[chosen]))
                shapes[number], rows[number] = candidates[chosen], ious[chosen]
    return fitness, shapes.tolist()


def _fitness(best: Tensor) -> Tensor:
    """Return the fraction of reached boxes and, where that is flat, a little of the mean IoU. best: [..., T]."""
    return (best >= POSITIVE_IOU).float().mean(dim=-1) + MEAN_WEIGHT * best.mean(dim=-1)


def _shape_iou(sides: Tensor, others: Tensor) -> Tensor:
    """Return the IoU of boxes (width, height) with the same centre, [T, k]."""
    return pairwise_overlap(pad(sides, (2, 0)), pad(others, (2, 0)))[1]  # the same corner gives the same IoU


def _shares(is_reached: npt.NDArray[np.bool_], group: npt.NDArray[np.int64], num_groups: int) -> list[float]:
    """Return the fraction of true values per group; NaN for an empty one."""
    totals = np.bincount(group, minlength=num_groups)
    reached = np.bincount(group, weights=is_reached, minlength=num_groups)
    return [float(r / t) if t else float("nan") for r, t in zip(reached, totals, strict=True)]

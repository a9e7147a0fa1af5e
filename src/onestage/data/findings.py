"""What was found in a data set, put into few words."""

from collections.abc import Iterable
from typing import get_args

import numpy as np

from onestage.data.rules import BOX_TINY
from onestage.types import AnnotationSet, Effect, Finding

EFFECTS = get_args(Effect)  # the gravest first
NUM_QUOTED = 3  # lines of what was left out that a training quotes


def start_messages(annotations: AnnotationSet) -> list[str]:
    """Return what a training says about a split when it starts: what was left out, and each other warning."""
    skipped = annotations.skipped
    messages = [f.line for f in annotations.findings if f.effect == "warning"]
    if skipped:
        more = len(skipped) - NUM_QUOTED
        lines = [*skipped[:NUM_QUOTED], *([f"and {more} more"] if more > 0 else [])]
        found = f"{annotations.source}: {len(skipped)} boxes or images were left out:"
        messages.append("\n  ".join([found, *lines]))
    return messages


def tiny_boxes(annotations: AnnotationSet, image_size: int) -> list[Finding]:
    """Say how many objects are under a pixel wide or high once their image is a square of side `image_size` px.

    Training leaves them out (`onestage.data.transforms`); evaluation counts them.
    """
    sizes = annotations.sizes[:, ::-1].repeat(np.diff(annotations.box_offsets), axis=0)  # [T, 2] (width, height)
    scale = np.where(sizes > 0, image_size / np.maximum(sizes, 1), 1.0)
    sides = (annotations.boxes[:, 2:] - annotations.boxes[:, :2]) * scale
    num_tiny = int(np.count_nonzero((sides < 1).any(axis=1)))
    problem = f"{num_tiny} of {len(sides)} boxes are less than 1 px wide or high at {image_size} px"
    return [BOX_TINY.broken(annotations.source, f"{problem}: not trained on", num_tiny)] if num_tiny else []


def grouped(findings: Iterable[Finding]) -> dict[tuple[str, str], list[Finding]]:
    """Return the findings by effect and rule, the gravest first, in the order in which they were found."""
    groups: dict[tuple[str, str], list[Finding]] = {}
    for finding in sorted(findings, key=lambda finding: EFFECTS.index(finding.effect)):
        groups.setdefault((finding.effect, finding.rule), []).append(finding)
    return groups

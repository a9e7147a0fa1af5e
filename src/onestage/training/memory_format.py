"""Memory format of a run: a rule on a GPU; on a CPU the faster one, found by timing training steps."""

import json
import math
import platform
import re
import time
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from statistics import median

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from onestage.errors import OnestageError
from onestage.files import atomic_write, cache_folder
from onestage.training.module import usual_memory_format
from onestage.types import PADDING, DetectionData, Detector, Targets

CACHE_FILE = "memory_format.json"
MAX_PIXELS = 4 * 300 * 300  # of a timed batch: larger batches give the same answer later
ROUNDS = 20  # steps of each format, in turn; the first compiles oneDNN's kernels and does not count
MAX_SECONDS = 10.0  # no round starts that would end after them
MIN_GAIN = 0.03  # of the step time; less is noise


def resolve_memory_format(detector: Detector, data: DetectionData, trainer: pl.Trainer) -> bool:
    """Return whether channels_last is the faster format of this training, and print the reason.

    Neither format always wins on a CPU, so steps are timed: of one process, since a loss of several may communicate.
    The answer is kept in the cache folder for this CPU, torch, detector, size of the batch and precision. Detector and
    random states stay unchanged.
    """
    device, precision = trainer.strategy.root_device.type, str(trainer.precision)
    if device != "cpu" or trainer.world_size > 1 or getattr(trainer, "fast_dev_run", False):
        return usual_memory_format(device, precision)
    canvas = max(data.canvases, key=math.prod)
    num_images = max(1, min(data.batch_size, MAX_PIXELS // math.prod(canvas)))
    size = f"{num_images} x {canvas[0]} x {canvas[1]}"
    kind = f"{type(detector).__module__}.{type(detector).__qualname__}"
    machine = (_cpu_name(), f"{torch.get_num_threads()} threads", f"torch {torch.__version__}")
    key = " | ".join((*machine, kind, size, precision))
    path = cache_folder() / CACHE_FILE
    known = _read_cache(path)
    if isinstance(known.get(key), bool):
        decided, reason = bool(known[key]), f"remembered in {path}"
    else:
        seconds = time_formats(detector, _random_batch(num_images, canvas, data.num_classes), trainer)
        decided = seconds[True] < (1 - MIN_GAIN) * seconds[False]
        reason = f"a step of {size} px takes {seconds[True]:.3g} s with it, {seconds[False]:.3g} s without"
        with suppress(OnestageError, OSError), atomic_write(path) as temporary:  # else the next run times again
            temporary.write_text(json.dumps({**known, key: decided}, indent=1), encoding="utf-8")
    rank_zero_info(f"channels_last: {str(decided).lower()} ({reason}); override it with model.channels_last")
    return decided


def time_formats(detector: Detector, batch: tuple[Tensor, Targets], trainer: pl.Trainer) -> dict[bool, float]:
    """Return the median seconds of forward, loss and backward with channels_last (True) and without (False)."""
    images, targets = batch
    seconds: dict[bool, list[float]] = {True: [], False: []}
    with isolate_rng(include_cuda=False):
        copy = deepcopy(detector).train()
        start = time.perf_counter()
        for number in range(1, ROUNDS + 1):
            for channels_last, times in seconds.items():
                layout = torch.channels_last if channels_last else torch.contiguous_format
                copy.to(memory_format=layout)
                begin = time.perf_counter()
                with trainer.precision_plugin.forward_context():
                    terms = copy.loss(copy(images.contiguous(memory_format=layout)), targets).terms
                torch.stack(list(terms.values())).sum().backward()  # type: ignore[no-untyped-call]
                times.append(time.perf_counter() - begin)
                copy.zero_grad()
            if (time.perf_counter() - start) * (number + 1) / number > MAX_SECONDS:
                break
    return {channels_last: median(times[1:] or times) for channels_last, times in seconds.items()}


def _random_batch(num_images: int, canvas: tuple[int, int], num_classes: int) -> tuple[Tensor, Targets]:
    """Return noise with one object in each image, from a generator of its own."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (num_images, 3, *canvas), dtype=torch.uint8, generator=generator)
    boxes = torch.zeros(num_images, 16, 4)
    boxes[:, 0] = torch.tensor([0.25, 0.25, 0.75, 0.75]) * torch.tensor([*canvas[::-1], *canvas[::-1]])
    labels = torch.full((num_images, 16), PADDING)
    labels[:, 0] = torch.randint(0, num_classes, (num_images,), generator=generator)
    return images, Targets(boxes, labels)


def _cpu_name() -> str:
    with suppress(OSError, UnicodeError):
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
        if found:
            return found[1]
    return platform.processor() or platform.machine()


def _read_cache(path: Path) -> dict[str, object]:
    with suppress(OSError, ValueError, RecursionError):
        content = json.loads(path.read_text(encoding="utf-8"))
        return content if isinstance(content, dict) else {}
    return {}

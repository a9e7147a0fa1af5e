"""Memory format of a run: a rule on a GPU; on a CPU the faster one, found by timing training steps."""

import json
import math
import platform
import time
from contextlib import suppress
from copy import deepcopy
from statistics import median

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng

from onestage.errors import OnestageError
from onestage.files import atomic_write, cache_folder
from onestage.training.batch_size import crowded_batch
from onestage.training.module import usual_memory_format
from onestage.types import Batch, DetectionData, Detector

CACHE_FILE = "memory_format.json"
MAX_PIXELS = 4 * 300 * 300  # of a timed batch: larger batches give the same answer later
ROUNDS = 20  # steps of each format, in turn; the first compiles oneDNN's kernels and does not count
MAX_SECONDS = 10.0  # no round starts that would end after them
MIN_GAIN = 0.03  # of the step time; less is noise


def resolve_memory_format(detector: Detector, data: DetectionData, trainer: pl.Trainer) -> bool:
    """Return whether channels_last is the faster format of this training, and print the reason.

    Neither format always wins on a CPU, so steps are timed: of one process, since a loss of several may communicate.
    The answer is kept in the cache folder for this machine, torch, detector, size of the batch and precision. Detector
    and random states stay unchanged.
    """
    device, precision = trainer.strategy.root_device.type, str(trainer.precision)
    if device != "cpu" or trainer.world_size > 1 or getattr(trainer, "fast_dev_run", False):
        return usual_memory_format(device, precision)
    canvas = max(data.canvases, key=math.prod)
    num_images = max(1, min(data.batch_size, MAX_PIXELS // math.prod(canvas)))
    size = f"{num_images} x {canvas[0]} x {canvas[1]}"
    kind = f"{type(detector).__module__}.{type(detector).__qualname__}"
    machine = (platform.node(), f"{torch.get_num_threads()} threads", f"torch {torch.__version__}")
    key = " | ".join((*machine, kind, size, precision))
    path = cache_folder() / CACHE_FILE
    known: dict[str, object] = {}
    with suppress(OSError, ValueError, TypeError):
        known.update(json.loads(path.read_text(encoding="utf-8")))
    if isinstance(known.get(key), bool):
        decided, reason = bool(known[key]), f"remembered in {path}"
    else:
        seconds = time_formats(detector, crowded_batch(data, num_images, trainer.strategy.root_device), trainer)
        decided = seconds[True] < (1 - MIN_GAIN) * seconds[False]
        reason = f"a step of {size} px takes {seconds[True]:.3g} s with it, {seconds[False]:.3g} s without"
        with suppress(OnestageError, OSError), atomic_write(path) as temporary:  # else the next run times again
            temporary.write_text(json.dumps({**known, key: decided}, indent=1), encoding="utf-8")
    rank_zero_info(f"channels_last: {str(decided).lower()} ({reason}); override it with model.channels_last")
    return decided


def time_formats(detector: Detector, batch: Batch, trainer: pl.Trainer) -> dict[bool, float]:
    """Return the median seconds of forward, loss and backward with channels_last (True) and without (False)."""
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
                    predictions = copy(batch.images.contiguous(memory_format=layout))
                    terms = copy.loss(predictions, batch.targets).terms
                torch.stack(list(terms.values())).sum().backward()  # type: ignore[no-untyped-call]
                times.append(time.perf_counter() - begin)
                copy.zero_grad()
            if (time.perf_counter() - start) * (number + 1) / number > MAX_SECONDS:
                break
    return {channels_last: median(times[1:] or times) for channels_last, times in seconds.items()}

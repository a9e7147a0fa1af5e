"""Settings found by measured training steps: the largest batch that fits, and the faster memory format of a CPU."""

import contextlib
import ctypes
import gc
import json
import math
import platform
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from statistics import median

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng

from onestage.errors import ConfigError, OnestageError
from onestage.files import atomic_write, cache_folder
from onestage.training.module import DetectionModule, usual_memory_format
from onestage.training.optimization import require_whole_weights
from onestage.types import Batch, DetectionData, Detector, Targets

GIB = 2**30
USABLE = 0.9  # fraction of the memory; the rest is for fragmentation, the loader's batches and the evaluation
STATUS, CGROUP = Path("/proc/self/status"), Path("/sys/fs/cgroup")

CACHE_FILE = "memory_format.json"
MAX_PIXELS = 4 * 300 * 300  # of a timed batch: larger batches give the same answer later
ROUNDS = 20  # steps of each format, in turn; the first compiles oneDNN's kernels and does not count
MAX_SECONDS = 10.0  # no round starts that would end after them
MIN_GAIN = 0.03  # of the step time; less is noise


def largest_batch(peak_bytes: Callable[[int], int | None], limit: int, max_batch_size: int) -> int:
    """Return the number of images that fit, 0 if not even one fits.

    Doubles the batch, but never goes beyond the point where the straight line through the last two peaks meets the
    limit; a batch that does not fit lowers the ceiling to nine tenths of it. From 8 images on it uses multiples of 8,
    the tile size of tensor cores. `peak_bytes` measures a step with a number of images; None means out of memory.
    """
    peaks: list[tuple[int, int]] = [(0, 0)]  # (images, bytes) of steps that fit
    ceiling, candidate = max_batch_size, 1
    while candidate > peaks[-1][0]:
        peak = peak_bytes(candidate)
        if peak is not None and peak <= limit:
            peaks.append((candidate, peak))
        else:
            ceiling = candidate * 9 // 10
        images, used = peaks[-1]
        candidate = min(ceiling, max(1, 2 * images))
        if len(peaks) > 2:
            bytes_per_image = max(1.0, (used - peaks[-2][1]) / (images - peaks[-2][0]))
            candidate = min(candidate, images + int((limit - used) / bytes_per_image))
        if 8 <= candidate < max_batch_size:
            candidate = candidate // 8 * 8
    return peaks[-1][0]


class AutoBatch(Callback):
    """Set `data.batch_size` to the largest batch that fits, before training starts.

    Measures whole steps in the run's precision, on images with as many objects as the most crowded training image.
    Weights are restored, so that the run equals one with the found number as `data.batch_size`. ConfigError if not even
    one image fits, or memory cannot be measured.

    Args:
        limit: bytes of the device, or on a CPU of the machine, for this process; None: its share of the free memory.
            A step gets 0.9 of it.
        averages_weights: whether an average of the weights will be kept.
        on_choice: receives the number.
    """

    def __init__(self, limit: int | None, averages_weights: bool, on_choice: Callable[[int], None]) -> None:
        self.limit, self.averages_weights, self.on_choice = limit, averages_weights, on_choice

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find the batch size; all processes use the smallest that one of them has found."""
        if stage != "fit":
            return
        assert isinstance(pl_module, DetectionModule)
        device = trainer.strategy.root_device
        require_whole_weights(trainer.strategy, "auto_batch", "auto_batch: false and data.batch_size")
        limit = int(USABLE * (self.limit or free_bytes(device, trainer.num_devices)))
        trainer.strategy.barrier("auto_batch")  # no process may allocate before all have read the free memory
        max_images = max(1, len(pl_module.data.annotations("train")) // trainer.world_size)
        pl_module.apply_memory_format()
        # Copies of the weights that a run adds: the average, and DDP's buckets of gradients.
        copies = int(self.averages_weights) + int(trainer.world_size > 1)
        extra = copies * sum(parameter.nbytes for parameter in pl_module.detector.parameters())
        with _restored(pl_module.detector, device):
            batch = largest_batch(lambda images: step_bytes(trainer, pl_module, images), limit - extra, max_images)
        batch = int(trainer.strategy.reduce(torch.tensor(batch, device=device), reduce_op="min"))
        if batch == 0:
            raise ConfigError(
                f"auto_batch: a step with one image needs more than {limit / GIB:.2f} GiB on {device}.\n"
                "Give it more memory (--auto_batch GIB), or choose a smaller model.detector or image_size."
            )
        pl_module.data.batch_size = batch
        self.on_choice(batch)
        rank_zero_info(f"auto_batch: data.batch_size {batch} per process within {limit / GIB:.2f} GiB on {device}")


@contextlib.contextmanager
def _restored(detector: torch.nn.Module, device: torch.device) -> Iterator[None]:
    state = {name: value.detach().cpu().clone() for name, value in detector.state_dict().items()}
    is_training = detector.training
    detector.to(device).eval()  # whose loss does not wait for other processes: they may take fewer steps here
    try:
        yield
    finally:
        detector.zero_grad(set_to_none=True)
        detector.load_state_dict(state)
        detector.train(is_training)
        _reset_peak(device)


def step_bytes(trainer: pl.Trainer, module: DetectionModule, num_images: int) -> int | None:
    """Take one step with `num_images` images; return the peak of memory, or None if out of memory."""
    device = trainer.strategy.root_device
    optimizer = module.make_optimizer()
    _reset_peak(device)
    try:
        max_objects = int(np.diff(module.data.annotations("train").box_offsets).max(initial=1))
        batch = blank_batch(module.data, num_images, max_objects, device)
        with trainer.precision_plugin.forward_context():
            losses = module.detector.loss(module.predict_batch(batch), batch.targets)
        module.weighted_loss(losses)["loss"].backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else _status_bytes(STATUS, "VmHWM")
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        return None
    finally:
        optimizer.zero_grad(set_to_none=True)


def blank_batch(data: DetectionData, num_images: int, num_objects: int, device: torch.device) -> Batch:
    """Return black images of the largest canvas, each with so many objects."""
    rows = -(-num_objects // 16) * 16  # as collate pads
    height, width = max(data.canvases, key=math.prod)
    images = torch.zeros(num_images, 3, height, width, dtype=torch.uint8, device=device)
    box = torch.tensor([width / 4, height / 4, width * 3 / 4, height * 3 / 4], device=device)
    targets = Targets(box.expand(num_images, rows, 4), box.new_zeros(num_images, rows, dtype=torch.int64))
    sizes, placements = box.new_tensor([[height, width]]).long(), box.new_tensor([[1.0, 1.0, 0.0, 0.0]])
    return Batch(images, targets, targets.labels[:, 0], sizes.expand(num_images, 2), placements.expand(num_images, 4))


def free_bytes(device: torch.device, num_processes: int = 1) -> int:
    """Return the bytes that this process may use, including those in use now; ConfigError if that is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    if device.type == "cpu" and STATUS.is_file():
        free = _status_bytes(Path("/proc/meminfo"), "MemAvailable")
        with contextlib.suppress(OSError, ValueError):  # no cgroup, or "max": no limit
            limit, used = (int((CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
            free = min(free, max(0, limit - used))
        return free // num_processes + _status_bytes(STATUS, "VmRSS")
    raise ConfigError(f"auto_batch cannot measure memory on {device}.\nSet auto_batch: false and data.batch_size.")


def _status_bytes(file: Path, key: str) -> int:
    (line,) = [line for line in file.read_text().splitlines() if line.startswith(f"{key}:")]
    return int(line.split()[1]) * 1024


def _reset_peak(device: torch.device) -> None:
    """Release unused memory and reset the recorded peak."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError, AttributeError):  # glibc keeps freed memory, in which a step would hide
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):  # without it the peaks are of all steps so far, which ascend
        Path("/proc/self/clear_refs").write_text("5")


def resolve_memory_format(detector: Detector, data: DetectionData, trainer: pl.Trainer) -> bool:
    """Return whether channels_last is the faster format of this training, and print the reason.

    Neither format always wins on a CPU, so steps are timed: of one process, since a loss of several may communicate.
    The answer is kept in the cache folder for this CPU, torch, detector, size of the batch and precision. Detector
    and random states stay unchanged.
    """
    device, precision = trainer.strategy.root_device.type, str(trainer.precision)
    if device != "cpu" or trainer.world_size > 1 or getattr(trainer, "fast_dev_run", False):
        return usual_memory_format(device, precision)
    canvas = max(data.canvases, key=math.prod)
    num_images = max(1, min(data.batch_size, MAX_PIXELS // math.prod(canvas)))
    size = f"{num_images} x {canvas[0]} x {canvas[1]}"
    kind = f"{type(detector).__module__}.{type(detector).__qualname__}"
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, UnicodeError, IndexError):  # Linux names the model here
        cpu = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("model name\t: ")[1].partition("\n")[0]
    machine = (cpu, f"{torch.get_num_threads()} threads", f"torch {torch.__version__}")
    key = " | ".join((*machine, kind, size, precision))
    path = cache_folder() / CACHE_FILE
    known: dict[str, object] = {}
    with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):
        known.update(json.loads(path.read_text(encoding="utf-8")))
    if isinstance(known.get(key), bool):
        decided, reason = bool(known[key]), f"remembered in {path}"
    else:
        seconds = time_formats(detector, blank_batch(data, num_images, 1, trainer.strategy.root_device), trainer)
        decided = seconds[True] < (1 - MIN_GAIN) * seconds[False]
        reason = f"a step of {size} px takes {seconds[True]:.3g} s with it, {seconds[False]:.3g} s without"
        with contextlib.suppress(OnestageError, OSError), atomic_write(path) as temporary:  # else timed again
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

"""The largest batch that a device has memory for, found by taking steps of training and not by a formula."""

import contextlib
import ctypes
import gc
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info

from onestage.errors import ConfigError
from onestage.training.module import DetectionModule
from onestage.training.strategies import shards_parameters
from onestage.types import Batch, Targets

GIB = 2**30
SHARE = 0.9  # of the memory; the rest is for fragmentation, the loader's batches and the evaluation
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
CGROUP = Path("/sys/fs/cgroup")
PeakBytes = Callable[[int], int | None]  # of a step with so many images; None where the device ran out of memory


def largest_batch(peak_bytes: PeakBytes, limit: int, most: int) -> int | None:
    """Return how many images fit, or None if not even the fewest do.

    Doubles the batch while the straight line through the last two peaks stays below the limit, goes to where that line
    meets the limit, and from there back by a tenth until a step confirms it. From 8 images on it takes multiples of 8,
    which is what tensor cores are made for.

    Args:
        peak_bytes: measures a step. Called in ascending order until the limit is near.
        limit: bytes.
        most: images, at least 1.
    """
    peaks: dict[int, int] = {}
    batch, fails = 1, most + 1
    while True:
        peak = peak_bytes(batch)
        if peak is None or peak > limit:
            fails = batch
            break
        peaks[batch] = peak
        if batch == most:
            return most
        following = min(2 * batch, most)
        if len(peaks) > 1 and _at_limit(peaks, limit) < following:
            break
        batch = following
    if not peaks:
        return None
    fits = max(peaks)
    candidate = _rounded(min(_at_limit(peaks, limit), fails - 1)) if len(peaks) > 1 else fits
    while candidate > fits:
        peak = peak_bytes(candidate)
        if peak is not None and peak <= limit:
            return candidate
        candidate = _rounded(candidate * 9 // 10)
    return fits


def _at_limit(peaks: dict[int, int], limit: int) -> int:
    """Return the batch at which the line through the two largest measurements meets the limit."""
    small, large = sorted(peaks)[-2:]
    bytes_per_image = max(1.0, (peaks[large] - peaks[small]) / (large - small))
    return large + int((limit - peaks[large]) / bytes_per_image)


def _rounded(batch: int) -> int:
    return batch // 8 * 8 if batch >= 8 else batch


class AutoBatch(Callback):
    """Sets `data.batch_size` to the largest batch that fits, before training starts.

    What is measured is a whole step: forward, loss, backward and an optimizer step with its state, on images and as
    many objects as the most crowded training image has, in the run's precision. The copies that an average of the
    weights and the exchange of gradients will make are added. Weights and random numbers are afterwards what they were,
    so that the run is the one that `data.batch_size` with the found number gives.

    Args:
        limit: bytes that this process may use, of the device or, on a CPU, of the machine; None: what is free, on a
            CPU in equal shares with the other processes of the machine. A step gets 0.9 of it.
        averages_weights: whether an average of the weights will be kept.
        on_choice: told the number.

    Raises:
        ConfigError: not even one image fits, or there is no way to measure.
    """

    def __init__(self, limit: int | None, averages_weights: bool, on_choice: Callable[[int], None]) -> None:
        self.limit = limit
        self.averages_weights = averages_weights
        self.on_choice = on_choice

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find the batch size. All processes go on with the smallest that one of them has found."""
        if stage != "fit":
            return
        assert isinstance(pl_module, DetectionModule)
        device = trainer.strategy.root_device
        if shards_parameters(trainer.strategy):
            raise ConfigError(
                f"auto_batch measures the whole model on one device, which {type(trainer.strategy).__name__} splits.\n"
                "Set auto_batch: false and data.batch_size, or trainer.strategy: ddp."
            )
        limit = int(SHARE * (self.limit or self._free_bytes(trainer)))
        most = max(1, len(pl_module.data.annotations("train")) // trainer.world_size)
        pl_module.lay_out()
        with _as_it_was(pl_module.detector, device):
            extra = self._extra_bytes(trainer, pl_module)
            batch = largest_batch(lambda images: step_bytes(trainer, pl_module, images), limit - extra, most)
        batch = _smallest_of_all(batch or 0, device)
        if batch == 0:
            raise ConfigError(
                f"auto_batch: a step with one image needs more than {limit / GIB:.2f} GiB on {device}.\n"
                "Give it more memory (--auto_batch GIB), or choose a smaller model.detector or image_size."
            )
        pl_module.data.batch_size = batch
        self.on_choice(batch)
        rank_zero_info(
            f"auto_batch: data.batch_size {batch} of each process within {limit / GIB:.2f} GiB on {device}"
            + (" (as many as there are training images)" if batch == most else "")
        )

    @staticmethod
    def _free_bytes(trainer: pl.Trainer) -> int:
        free = free_bytes(trainer.strategy.root_device, trainer.num_devices)
        trainer.strategy.barrier("auto_batch")  # before the first of them takes what another counts as free
        return free

    def _extra_bytes(self, trainer: pl.Trainer, module: DetectionModule) -> int:
        weights = sum(parameter.nbytes for parameter in module.detector.parameters())
        copies = int(self.averages_weights) + int(trainer.world_size > 1)  # the average; DDP's buckets of gradients
        return copies * weights


@contextlib.contextmanager
def _as_it_was(detector: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """Put the detector on the device in evaluation mode, and afterwards give it its weights and its mode back."""
    state = {name: value.detach().cpu().clone() for name, value in detector.state_dict().items()}
    is_training = detector.training
    # In evaluation mode the loss waits for no other process: some may be taking fewer steps here.
    detector.to(device).eval()
    try:
        yield
    finally:
        detector.zero_grad(set_to_none=True)
        detector.load_state_dict(state)
        detector.train(is_training)
        _forget(device)


def step_bytes(trainer: pl.Trainer, module: DetectionModule, num_images: int) -> int | None:
    """Take one step with `num_images` images; return the peak of memory, or None if there was not enough."""
    device = trainer.strategy.root_device
    optimizer = module.make_optimizer()
    _forget(device)
    try:
        batch = _crowded_batch(module, num_images, device)
        with trainer.precision_plugin.forward_context():
            losses = module.detector.loss(module.detector(batch.images), batch.targets)
        torch.stack(list(losses.terms.values())).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return _peak_bytes(device)
    except (torch.OutOfMemoryError, MemoryError):
        return None
    except RuntimeError as error:  # what the allocator of the CPU says
        if "memory" in str(error):
            return None
        raise
    finally:
        optimizer.zero_grad(set_to_none=True)


def _crowded_batch(module: DetectionModule, num_images: int, device: torch.device) -> Batch:
    """Return a batch like those of training, each image with as many objects as the most crowded one."""
    objects = int(np.diff(module.data.annotations("train").box_offsets).max(initial=1))
    rows = -(-objects // 16) * 16  # as collate pads
    height, width = max(module.data.canvases, key=math.prod)
    box = torch.tensor([0.25, 0.25, 0.75, 0.75], device=device) * torch.tensor([width, height] * 2, device=device)
    layout = torch.channels_last if module.channels_last else torch.contiguous_format
    images = torch.zeros(num_images, 3, height, width, dtype=torch.uint8, device=device)
    labels = torch.zeros(num_images, rows, dtype=torch.int64, device=device)
    sizes = torch.tensor([[height, width]] * num_images, device=device)
    placements = torch.tensor([[1.0, 1.0, 0.0, 0.0]] * num_images, device=device)
    targets = Targets(box.expand(num_images, rows, 4), labels)
    return Batch(images.contiguous(memory_format=layout), targets, labels[:, 0], sizes, placements)


def free_bytes(device: torch.device, num_processes: int = 1) -> int:
    """Return what this process may still use, with what it uses now.

    Args:
        device: of this process.
        num_processes: of this run on this machine, which on a CPU share what is free.

    Raises:
        ConfigError: there is no way to find out.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    if device.type == "cpu" and STATUS.is_file():
        free = [int(_kilobytes(Path("/proc/meminfo"), "MemAvailable")) * 1024]
        for name in ("memory.max", "memory.current"):
            with contextlib.suppress(OSError, ValueError):  # "max": no limit
                free.append(int((CGROUP / name).read_text()))
        all_free = min(free[0], max(0, free[1] - free[2])) if len(free) == 3 else free[0]
        return all_free // num_processes + _resident_bytes()
    raise ConfigError(f"auto_batch cannot measure memory on {device}.\nSet auto_batch: false and data.batch_size.")


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_reserved(device)
    return _kilobytes(STATUS, "VmHWM") * 1024


def _resident_bytes() -> int:
    return _kilobytes(STATUS, "VmRSS") * 1024


def _kilobytes(file: Path, key: str) -> int:
    (line,) = [line for line in file.read_text().splitlines() if line.startswith(f"{key}:")]
    return int(line.split()[1])


def _forget(device: torch.device) -> None:
    """Give back what is not in use, and begin the record of the peak anew."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError, AttributeError):  # glibc keeps what is freed, and a step would hide in that
            ctypes.CDLL(None).malloc_trim(0)
        with contextlib.suppress(OSError):  # then the peaks are of all steps so far, and those ascend
            CLEAR.write_text("5")


def _smallest_of_all(batch: int, device: torch.device) -> int:
    if not (dist.is_available() and dist.is_initialized()):
        return batch
    number = torch.tensor(batch, device=device)
    dist.all_reduce(number, op=dist.ReduceOp.MIN)
    return int(number.item())

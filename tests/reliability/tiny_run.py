"""Run `onestage fit` in seconds: a tiny detector with dropout on a drawn set, with faults on demand.

As a program it is `onestage` with the fault of the variable ONESTAGE_FAULT; the processes that Lightning starts run
this same file.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

import processes
from command_line import REPOSITORY, run as onestage
from tiny_training import TinyDetector

from onestage.training.module import DetectionModule
from onestage.types import Predictions


class ForgetfulDetector(TinyDetector):
    """A tiny detector with dropout: other random numbers lead to other weights."""

    dropout: ClassVar = 0.2

    def forward(self, images: Tensor) -> Predictions:
        predictions = super().forward(images)
        logits = torch.nn.functional.dropout(predictions.class_logits, self.dropout, self.training)
        return predictions._replace(class_logits=logits)


def words(data: Path, runs: Path, *options: str, epochs: int = 2, source: str = "Shapes") -> list[str]:
    """Return the command line of a run of 8 steps an epoch, saved at every step."""
    sources = {
        "Shapes": ["path", str(data), "num_train", "32", "num_val", "7", "draw_seed", "0", "max_objects", "6"],
        "COCO": ["path", str(data)],
    }
    keys = [f"--data.source.{word}" if index % 2 == 0 else word for index, word in enumerate(sources[source])]
    return [
        "fit", "--config", str(REPOSITORY / "configs" / "shapes_ssd.yaml"), "--experiment", "tiny",
        "--data.source", f"onestage.data.{source}", *keys,
        "--data.num_workers", "0", "--data.batch_size", "4", "--data.image_size", "64",
        "--model.detector.class_path", "tiny_run.ForgetfulDetector", "--model.schedule.warmup_steps", "3",
        "--trainer.max_epochs", str(epochs), "--trainer.check_val_every_n_epoch", "1", "--trainer.accelerator", "cpu",
        "--trainer.log_every_n_steps", "1", "--trainer.enable_progress_bar", "false", "--trainer.precision", "32-true",
        "--model.channels_last", "false", "--model.multi_scale", "null",
        "--trainer.enable_model_summary", "false", "--trainer.num_sanity_val_steps", "0", "--drawn_images", "0",
        "--last_checkpoint.every_n_steps", "1", "--runs_dir", str(runs), *options,
    ]  # fmt: skip


def send(number: int) -> None:
    """Send this process a signal, and let Python handle it."""
    os.kill(os.getpid(), number)
    time.sleep(0)


def at_call(count: int, action: object, function: object) -> object:
    """Wrap a function so that its call number `count`, from 1, runs `action` first."""
    calls = 0

    def wrapped(*arguments: object, **named: object) -> object:
        nonlocal calls
        calls += 1
        if calls == count:
            action()
        return function(*arguments, **named)

    return wrapped


def differences(one: object, other: object, path: str = "") -> list[str]:
    """Return where two checkpoints differ, to the bit; paths, times and the configuration aside."""
    if path.endswith(("dirpath", "_path", "best_k_models", "versions", "config", "/Timer")):
        return []
    if isinstance(one, dict) and isinstance(other, dict):
        keys = sorted(one.keys() | other.keys(), key=str)
        missing = [f"{path}/{key} is in one only" for key in keys if (key in one) != (key in other)]
        both = [key for key in keys if key in one and key in other]
        return missing + [line for key in both for line in differences(one[key], other[key], f"{path}/{key}")]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        pairs = zip(one, other, strict=True)
        return [line for index, (a, b) in enumerate(pairs) for line in differences(a, b, f"{path}/{index}")]
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return [] if torch.equal(one, other) else [f"{path}: tensors differ"]
    return [] if one == other or (one != one and other != other) else [f"{path}: {one!r} and {other!r}"]


def final_state(folder: Path) -> dict[str, object]:
    """Return the last checkpoint of a run, from weights to progress, and the numbers of its evaluation."""
    state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    best = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)
    results = json.loads((folder / "results.json").read_text())
    return {
        **{key: state[key] for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch")},
        **{key: value for key, value in state.items() if key in ("current_model_state", "MixedPrecision")},
        "callbacks": state["callbacks"],
        "position": state["DetectionDataModule"]["batches"] % 8,  # of an epoch of 8
        "best": {key: best[key] for key in ("state_dict", "global_step")},
        "metrics": results["metrics"],
        "per_class": results["per_class"],
    }


class CutFile:
    """A file whose write number `count` writes half of its bytes, then runs `action`."""

    def __init__(self, file: object, count: int, action: object) -> None:
        self.file = file
        self.count = count
        self.action = action

    def write(self, content: object) -> int:
        self.count -= 1
        if self.count == 0:
            self.file.write(bytes(content)[: len(content) // 2])
            self.file.flush()
            self.action()
        return self.file.write(content)

    def __getattr__(self, name: str) -> object:
        return getattr(self.file, name)


def break_at(where: str, count: int, action: object) -> None:
    """Run `action` at call number `count` of a moment: step, validation, write, sync, replace, a hook of the module."""
    if where == "write":
        save = torch.save
        calls = iter(range(1, 10**9))
        torch.save = lambda checkpoint, file: save(checkpoint, CutFile(file, 4 if next(calls) == count else 0, action))
    elif where == "sync":
        os.fsync = at_call(count, action, os.fsync)
    elif where == "replace":
        os.replace = at_call(count, action, os.replace)
    else:
        name = {"step": "training_step", "validation": "validation_step"}.get(where, where)
        setattr(DetectionModule, name, at_call(count, action, getattr(DetectionModule, name)))


def end_of_broken(command: list[str], where: str, count: int, *signals: str) -> int:
    """Run a command as a process that gets signals at a moment; return its exit code, negative for a signal."""
    fault = f"0:{where}:{count}:{'+'.join(signals)}"
    return processes.end_of(processes.start(__file__, *command, environment={"ONESTAGE_FAULT": fault}))[0]


def break_by_environment() -> None:
    """Apply ONESTAGE_FAULT, for example `1:step:3:SIGTERM+SIGINT`: in process 1, at the third step."""
    fault = os.environ.get("ONESTAGE_FAULT", "")
    rank, where, count, names = fault.split(":") if fault else ("", "", "0", "")
    if rank == os.environ.get("LOCAL_RANK", "0"):
        break_at(where, int(count), lambda: [send(getattr(signal, name)) for name in names.split("+")])


def folder_of(runs: Path) -> Path:
    """Return the folder of the only run."""
    (folder,) = runs.glob("tiny/version_*")
    return folder


def is_same_end(whole: Path, resumed: Path) -> bool:
    """Return whether two runs ended with the same bits."""
    return differences(final_state(whole), final_state(resumed)) == []


def break_method(monkeypatch: pytest.MonkeyPatch, method: str, count: int, action: Callable[[], object]) -> None:
    """Run `action` at call number `count` of a method of DetectionModule."""
    monkeypatch.setattr(DetectionModule, method, at_call(count, action, getattr(DetectionModule, method)))


def end_of_signalled(command: list[str], count: int, method="training_step", number: int = signal.SIGTERM) -> int:
    """Run a command that gets a signal at call number `count` of a method; return its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        break_method(patch, method, count, lambda: send(number))
        return onestage(*command)


if __name__ == "__main__":
    sys.modules["tiny_run"] = sys.modules["__main__"]
    break_by_environment()
    sys.exit(onestage(*sys.argv[1:]))

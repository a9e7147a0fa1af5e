"""Saving a checkpoint whole: on the disk, under its name in one step, and checked when read, beside Lightning's own."""

import tempfile
from pathlib import Path

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from benchmarks.timing import compare
from onestage.reliability.checkpoints import AtomicCheckpointIO
from onestage.training.module import CHECKPOINT_KEY, CHECKPOINT_SCHEMA


def run(rounds: int, quick: bool) -> None:
    """Save and load what training SSD300 with SGD and momentum keeps: weights twice, 200 MB; 4 MB where quick."""
    checkpoint = checkpoint_of(4 if quick else 200)
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:  # a real disk, where /tmp is often memory
        paths = {name: Path(folder) / f"{name}.ckpt" for name in ("lightning", "onestage")}
        files = {"lightning": TorchCheckpointIO(), "onestage": AtomicCheckpointIO()}
        compare(
            "saving a checkpoint",
            {
                "lightning, no fsync": lambda: files["lightning"].save_checkpoint(checkpoint, paths["lightning"]),
                "onestage, fsync of file and folder": lambda: files["onestage"].save_checkpoint(
                    checkpoint, paths["onestage"]
                ),
            },
            rounds,
        )
        compare(
            "loading a checkpoint",
            {
                "lightning, unchecked": lambda: files["lightning"].load_checkpoint(
                    paths["lightning"], weights_only=True
                ),
                "onestage, every checksum": lambda: files["onestage"].load_checkpoint(paths["onestage"]),
            },
            rounds,
        )
        both = [files[name].load_checkpoint(path, weights_only=True) for name, path in paths.items()]
    assert all(torch.equal(both[0]["state_dict"][name], both[1]["state_dict"][name]) for name in both[0]["state_dict"])
    print("asserted: both read back the same tensors")


def checkpoint_of(megabytes: int) -> dict[str, object]:
    """Return something with the shape of a checkpoint: 60 tensors of weights and as many of momentum."""
    numbers = megabytes * 250_000 // 120
    weights = {f"layer{number}.weight": torch.randn(numbers) for number in range(60)}
    momentum = {number: {"momentum_buffer": torch.randn(numbers)} for number in range(60)}
    ours = {"schema": CHECKPOINT_SCHEMA, "detector": "", "image_size": 1, "class_names": ["a"], "category_ids": [1]}
    return {
        "state_dict": weights,
        "momentum": momentum,  # `optimizer_states` would have to come with all else that a training goes on from
        "global_step": 1,
        CHECKPOINT_KEY: ours,
    }

"""Checkpoints as `onestage fit` writes them, with small weights, for tests that damage or falsify them."""

from pathlib import Path
from typing import Any

import torch

from onestage.training.module import CHECKPOINT_SCHEMA

DETECTOR, SOURCE = "onestage.config.model.detector.init_args", "onestage.config.data.source.init_args"


def contents() -> dict[str, Any]:
    """Return the entries of a checkpoint of SSD160 on three classes."""
    loss = {"class_path": "onestage.losses.SigmoidFocalLoss", "init_args": {"alpha": 0.5, "gamma": 2.0}}
    detector = {"classification_loss": loss, "score_threshold": 0.01, "anchors": "voc"}
    source = {"class_path": "onestage.data.Shapes", "init_args": {"path": "data.v2", "num_train": 8, "num_val": 4}}
    return {
        "state_dict": {"detector.a": torch.arange(600.0), "detector.b": torch.ones(2, 3)},
        "global_step": 5,
        "epoch": 0,
        "optimizer_states": [{"state": {}, "param_groups": [{"params": [0, 1]}]}],
        "onestage": {
            "schema": CHECKPOINT_SCHEMA, "detector": "SSD160", "image_size": 160, "class_names": ["a", "b", "c"],
            "category_ids": [1, 2, 3], "versions": {"torch": "2.0.0"},
            "config": {
                "model": {
                    "detector": {"class_path": "onestage.models.SSD160", "init_args": detector},
                    "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.1}},
                    "loss_weights": {"box": 0.2},
                },
                "data": {"source": source, "image_size": 160, "batch_size": 8, "num_workers": 4},
            },
        },
    }  # fmt: skip


def changed(place: str, value: object, saved: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the entries with another value at a dotted place; `...` removes the entry. saved: others than usual."""
    saved = saved or contents()
    *parents, last = place.split(".")
    node = saved
    for name in parents:
        node = node.setdefault(name, {})
    node[last] = value
    if value is ...:
        del node[last]
    return saved


def write(path: Path, saved: dict[str, Any] | None = None) -> Path:
    torch.save(saved or contents(), path)
    return path

from pathlib import Path

import cv2
import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from onestage.data.datamodule import DetectionDataModule
from onestage.data.dataset import DetectionDataset, collate
from onestage.data.loader import DetectionLoader, open_loader, start_worker
from onestage.data.samplers import TrainingSampler
from onestage.data.transforms import SeededTransform, ssd_transforms
from onestage.errors import ConfigError
from onestage.types import AnnotationSet, Batch

NUM_IMAGES = 11


@pytest.fixture
def annotations(tmp_path: Path) -> AnnotationSet:
    """Eleven small images with one object each."""
    paths = []
    for number in range(NUM_IMAGES):
        pixels = np.random.default_rng(number).integers(0, 256, (30, 40, 3), dtype=np.uint8)
        paths.append(str(tmp_path / f"{number}.jpg"))
        cv2.imwrite(paths[-1], pixels)
    return AnnotationSet(
        source="hand-written",
        image_paths=np.array(paths),
        image_ids=np.arange(1, NUM_IMAGES + 1),
        sizes=np.full((NUM_IMAGES, 2), (30, 40), dtype=np.int32),
        box_offsets=np.arange(NUM_IMAGES + 1),
        boxes=np.full((NUM_IMAGES, 4), (5, 5, 35, 25), dtype=np.float32),
        labels=np.zeros(NUM_IMAGES, dtype=np.int64),
        areas=np.ones(NUM_IMAGES, dtype=np.float32),
        is_crowd=np.zeros(NUM_IMAGES, dtype=bool),
        is_difficult=np.zeros(NUM_IMAGES, dtype=bool),
        class_names=("a",),
        category_ids=(1,),
    )


def training_loader(
    annotations: AnnotationSet, num_workers: int = 0, *, batch_size: int = 2, seed: int = 0, world_size: int = 1
) -> DetectionLoader:
    dataset = DetectionDataset(annotations, SeededTransform(ssd_transforms(32), 32), seed=seed)
    return DetectionLoader(
        dataset,
        batch_size=batch_size,
        sampler=TrainingSampler(dataset, batch_size=batch_size, seed=seed, world_size=world_size),
        collate_fn=collate,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        worker_init_fn=start_worker,
    )


def epoch_bytes(loader: DetectionLoader, epoch: int) -> list[bytes]:
    loader.sampler.set_epoch(epoch)
    return [as_bytes(batch) for batch in loader]


def as_bytes(batch: Batch) -> bytes:
    tensors = [batch.images, *batch.targets, batch.image_indices, batch.original_sizes]
    return b"".join(tensor.contiguous().numpy().tobytes() for tensor in tensors)


def test_samples_are_the_same_for_any_number_of_workers_and_new_in_every_epoch(annotations: AnnotationSet) -> None:
    expected = [epoch_bytes(training_loader(annotations), epoch) for epoch in range(3)]
    assert [len(epoch) for epoch in expected] == [5, 5, 5]
    assert len({batch for epoch in expected for batch in epoch}) == 15
    for num_workers in (1, 2):
        loader = training_loader(annotations, num_workers)
        assert [epoch_bytes(loader, epoch) for epoch in range(3)] == expected


@pytest.mark.parametrize("start_method", ["fork", pytest.param("spawn", marks=pytest.mark.slow), "forkserver"])
def test_samples_are_the_same_however_workers_are_started(annotations: AnnotationSet, start_method: str) -> None:
    expected = epoch_bytes(training_loader(annotations), 1)
    dataset = DetectionDataset(annotations, SeededTransform(ssd_transforms(32), 32))
    loader = open_loader(
        dataset,
        TrainingSampler(dataset, batch_size=2, seed=0),
        batch_size=2,
        num_workers=1,
        prefetch_factor=2,
        timeout_seconds=300.0,
        start_method=start_method,
    )
    assert epoch_bytes(loader, 1) == expected


def test_samples_of_a_step_are_the_same_for_any_number_of_processes(annotations: AnnotationSet) -> None:
    alone = training_loader(annotations, batch_size=4)
    alone.sampler.set_epoch(2)
    shares = []
    for rank in (0, 1):
        dataset = DetectionDataset(annotations, SeededTransform(ssd_transforms(32), 32))
        sampler = TrainingSampler(dataset, batch_size=2, seed=0, rank=rank, world_size=2)
        sampler.set_epoch(2)
        shares.append(DetectionLoader(dataset, batch_size=2, sampler=sampler, collate_fn=collate))
    for whole, *parts in zip(alone, *shares, strict=True):
        expected = images_by_index(whole)
        assert len(expected) == 4
        assert images_by_index(parts[0]) | images_by_index(parts[1]) == expected


def images_by_index(batch: Batch) -> dict[int, bytes]:
    pairs = zip(batch.image_indices.tolist(), batch.images, strict=True)
    return {index: image.numpy().tobytes() for index, image in pairs}


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("batches_done", [1, 3, 4])
def test_resumed_loader_gives_the_remaining_batches(
    annotations: AnnotationSet, num_workers: int, batches_done: int
) -> None:
    whole = training_loader(annotations, num_workers)
    expected = epoch_bytes(whole, 4)

    stopped = training_loader(annotations, num_workers)
    stopped.sampler.set_epoch(4)
    iterator = iter(stopped)
    for _ in range(batches_done):
        next(iterator)
    state = stopped.state_dict()
    assert (state["epoch"], state["batches"]) == (4, batches_done)

    resumed = training_loader(annotations, num_workers)
    resumed.load_state_dict(state)
    iterator = iter(resumed)  # before the epoch is known, as Lightning does
    resumed.sampler.set_epoch(4)
    assert [as_bytes(batch) for batch in iterator] == expected[batches_done:]
    assert resumed.state_dict()["batches"] == 5
    assert epoch_bytes(resumed, 5) == epoch_bytes(whole, 5)  # the next epoch is whole again


def test_resumed_loader_that_is_saved_again_before_its_first_batch_keeps_its_position(
    annotations: AnnotationSet,
) -> None:
    loader = training_loader(annotations)
    state = loader.state_dict() | {"epoch": 2, "batches": 3}
    loader.load_state_dict(state)
    assert loader.state_dict() == state


def test_position_at_the_end_of_an_epoch_means_a_whole_next_epoch(annotations: AnnotationSet) -> None:
    loader = training_loader(annotations)
    epoch_bytes(loader, 0)
    for epoch in (0, 1):
        resumed = training_loader(annotations)
        resumed.load_state_dict(loader.state_dict())
        assert len(epoch_bytes(resumed, epoch)) == 5


def test_position_of_an_epoch_cut_short_is_not_used_in_the_next(annotations: AnnotationSet) -> None:
    loader = training_loader(annotations)
    state = loader.state_dict() | {"epoch": 0, "batches": 3}  # limit_train_batches=3
    loader.load_state_dict(state)
    assert len(epoch_bytes(loader, 1)) == 5


def test_abandoned_iteration_does_not_shift_the_next(annotations: AnnotationSet) -> None:
    loader = training_loader(annotations)
    expected = epoch_bytes(loader, 0)
    loader.load_state_dict(loader.state_dict() | {"batches": 2})
    loader.sampler.set_epoch(0)
    next(iter(loader))
    assert epoch_bytes(loader, 0) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, r"(?s)seed_everything was 0; now it is 1.*back to 0"),
        ({"batch_size": 3}, r"(?s)after 2 of 5 batches of epoch 1, when data.batch_size was 2; now it is 3"),
        ({"world_size": 2}, "trainer.devices was 1; now it is 2"),
    ],
)
def test_position_inside_an_epoch_needs_the_same_settings(
    annotations: AnnotationSet, change: dict[str, int], message: str
) -> None:
    state = training_loader(annotations).state_dict() | {"epoch": 1, "batches": 2}
    other = training_loader(annotations, **change)
    with pytest.raises(ConfigError, match=message):
        other.load_state_dict(state)
    other.load_state_dict(state | {"batches": 5})  # between two epochs they may change


def test_loader_can_be_rebuilt_from_dataloader_arguments(annotations: AnnotationSet) -> None:
    dataset = DetectionDataset(annotations, SeededTransform(ssd_transforms(32), 32))
    loader = DetectionLoader(dataset, 2, False, collate_fn=collate)
    assert len(list(loader)) == 6
    assert loader.state_dict() == {}
    loader.load_state_dict({})


# -- under Lightning ---------------------------------------------------------------------------------------------------


class OneSplit(DetectionDataModule):
    """A data module around a hand-written set."""

    def __init__(self, annotations: AnnotationSet, num_workers: int) -> None:
        super().__init__("nowhere", image_size=32, batch_size=2, num_workers=num_workers)
        self.split = annotations

    def parse(self, split: str, class_names: object) -> AnnotationSet:
        return self.split


class Recorder(pl.LightningModule):
    """Learns nothing of use, and writes down what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.seen: list[bytes] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.seen.append(as_bytes(batch))
        return self.layer(batch.images.float().mean().reshape(1)).sum()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        pass

    def predict_step(self, batch: Batch, batch_idx: int) -> list[int]:
        return batch.image_indices.tolist()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        _ = self.trainer.estimated_stepping_batches  # asks for the loader before a checkpoint has restored the loops
        return torch.optim.SGD(self.parameters(), lr=1e-6)


def trainer(folder: Path, **settings: object) -> pl.Trainer:
    checkpoints = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    return pl.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[checkpoints] if settings.get("enable_checkpointing", True) else [],
        use_distributed_sampler=False,
        **settings,
    )


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("num_workers", [0, 1])
def test_training_resumed_at_any_step_sees_what_an_uninterrupted_one_sees(
    annotations: AnnotationSet, tmp_path: Path, num_workers: int
) -> None:
    whole = Recorder()
    trainer(tmp_path, max_epochs=3).fit(whole, OneSplit(annotations, num_workers))
    assert len(whole.seen) == 15
    for step in (2, 5, 8) if num_workers == 0 else (7,):
        resumed = Recorder()
        run = trainer(tmp_path, max_epochs=3, enable_checkpointing=False)
        run.fit(resumed, OneSplit(annotations, num_workers), ckpt_path=tmp_path / f"step={step}.ckpt")
        assert resumed.seen == whole.seen[step:]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_lightning_may_rebuild_the_loaders(annotations: AnnotationSet, tmp_path: Path) -> None:
    run = trainer(tmp_path, enable_checkpointing=False)
    batches = run.predict(Recorder(), OneSplit(annotations, 0))
    assert [index for batch in batches for index in batch] == list(range(NUM_IMAGES))
    overfitted = Recorder()
    run = trainer(tmp_path, enable_checkpointing=False, max_epochs=2, overfit_batches=1)
    run.fit(overfitted, OneSplit(annotations, 0))
    assert len(overfitted.seen) == 2

from dataclasses import replace

import numpy as np
import pytest
import torch
from evaluation_data import annotation_set, coco_numbers, detections, flat, random_evaluation

from onestage.data.annotations import select_images
from onestage.evaluation.analysis import overlapping_pairs
from onestage.report import comparison
from onestage.report.comparison import (
    Matches,
    are_comparable,
    collect_matches,
    difference_interval,
    read_matches,
    resampled_map,
    write_matches,
)
from onestage.types import AnnotationSet, Detections

BOX = [0.0, 0.0, 50.0, 50.0]


def matches_of(annotations: AnnotationSet, found: Detections) -> Matches:
    flat_found, objects = flat(annotations, found)
    pairs = overlapping_pairs(flat_found, objects)
    return collect_matches(flat_found, objects, pairs, annotations.image_ids, len(annotations.class_names))


def test_map_of_drawn_images_is_that_of_pycocotools_on_a_set_with_copies() -> None:
    annotations, found = random_evaluation(3, num_images=30)
    found = found._replace(scores=found.scores + torch.rand(found.scores.shape) * 1e-4)  # copies would break ties
    matches, random = matches_of(annotations, found), np.random.default_rng(0)
    drawn = np.stack([np.ones(30, np.int64), *random.multinomial(30, np.full(30, 1 / 30), size=3)])
    expected = []
    for weights in drawn:
        rows = np.repeat(np.arange(30), weights)
        copies = replace(select_images(annotations, rows), image_ids=np.arange(1, 31))
        expected.append(coco_numbers(copies, Detections(*(column[rows] for column in found)))["mAP"])
    assert resampled_map(matches, drawn).tolist() == pytest.approx(expected, abs=1e-9)


def test_interval_of_two_images_one_of_which_only_the_first_run_finds() -> None:
    annotations = annotation_set([[BOX], [BOX]], [[0], [0]])
    both = matches_of(annotations, detections([[BOX], [BOX]], [[0.9], [0.8]], [[0], [0]]))
    one = matches_of(annotations, detections([[BOX], []], [[0.9], []], [[0], []]))
    # Half of the objects found: precision 1 at the recalls 0, 0.01, ..., 0.5.
    assert resampled_map(one, np.array([[2, 0], [1, 1], [0, 2]])).tolist() == pytest.approx([1, 51 / 101, 0])
    assert np.isnan(resampled_map(one, np.array([[0, 0]]))).all()
    assert difference_interval(both, one) == (-1.0, 0.0)
    assert difference_interval(both, both, num_resamples=10) == (0.0, 0.0)
    assert are_comparable(both, one)
    other = matches_of(annotation_set([[BOX], []], [[0], []]), detections([[], []], [[], []], [[], []]))
    assert not are_comparable(both, other)


def test_matches_survive_their_file_unless_it_is_too_large(tmp_path, monkeypatch) -> None:
    matches = matches_of(*random_evaluation(1, num_images=8))
    write_matches(tmp_path / "matches.npz", matches)
    read = read_matches(tmp_path / "matches.npz")
    assert all(np.array_equal(one, other) for one, other in zip(matches, read, strict=True))
    monkeypatch.setattr(comparison, "MAX_BYTES", 100)
    write_matches(tmp_path / "matches.npz", matches)
    assert read_matches(tmp_path / "matches.npz") is None

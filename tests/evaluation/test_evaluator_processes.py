"""Two processes must give what one gives, to the last digit."""

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from evaluation_data import random_evaluation

from onestage.evaluation.coco import CocoEvaluator
from onestage.types import Detections

NUM_IMAGES = 7


def _evaluate(parts):
    annotations, found = random_evaluation(5, num_images=NUM_IMAGES)
    evaluator = CocoEvaluator(annotations)
    for indices in parts:
        evaluator.update(indices, Detections(*(tensor[indices] for tensor in found)))
    metrics = evaluator.compute()
    return repr((metrics, evaluator.per_class(), evaluator.results()))


def _run(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    # Images 0 2 4 6 and 1 3 5, the second filled up with a repeat of 0: 4 + 3 different ones in unequal batches.
    uneven = [torch.tensor([0, 2]), torch.tensor([4, 6])] if rank == 0 else [torch.tensor([1, 3, 5, 0])]
    one_idle = [torch.arange(NUM_IMAGES)] if rank == 0 else []
    (folder / f"{rank}.txt").write_text("\n".join([_evaluate(uneven), _evaluate(one_idle)]))
    dist.destroy_process_group()


def test_uneven_shares_with_a_repeat_equal_the_single_process(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    mp.spawn(_run, args=(tmp_path,), nprocs=2)
    expected = _evaluate([torch.arange(NUM_IMAGES)])
    for rank in range(2):
        assert (tmp_path / f"{rank}.txt").read_text().splitlines() == [expected, expected]

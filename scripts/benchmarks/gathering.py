"""The evaluation of two processes beside that of one: what bringing the detections together costs."""

import resource
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.mean_average_precision import BATCH_SIZE, synthetic_evaluation
from benchmarks.timing import compare
from onestage.evaluation.coco import CocoEvaluator
from onestage.types import AnnotationSet, Detections

NUM_PROCESSES = 2


def run(rounds: int, quick: bool) -> None:
    """Evaluate 5,000 images with 100 detections each, held by one process and shared by two."""
    sizes = (61, 20) if quick else (5000, 100)  # an odd number: the shares differ
    annotations, detections = synthetic_evaluation(*sizes)
    results: dict[str, list[str]] = {"one process": [], "two processes": []}
    with TemporaryDirectory() as folder:
        ends = [_start(rank, Path(folder), sizes) for rank in range(NUM_PROCESSES)]
        for _, end in ends:
            assert end.recv() == "ready"
        contestants = {
            "one process": lambda: results["one process"].append(_evaluate(annotations, detections, rank=0, step=1)),
            "two processes": lambda: results["two processes"].extend(_ask(ends)),
        }
        compare(f"{sizes[0]} images x {sizes[1]} detections, updates and numbers", contestants, rounds, warm_up=False)
        for rank, (process, end) in enumerate(ends):
            end.send(False)
            print(f"process {rank}: at most {end.recv():,} MB, PyTorch and the detections before gathering included")
            process.join()
    assert len(set(results["one process"] + results["two processes"])) == 1, "the numbers differ"
    print("asserted: the numbers of two processes are those of one, to the last digit, on both")


def _start(rank: int, folder: Path, sizes: tuple[int, int]) -> tuple[BaseProcess, Connection]:
    end, other_end = mp.Pipe()
    process = mp.get_context("spawn").Process(target=_work, args=(rank, folder, sizes, other_end), daemon=True)
    process.start()
    return process, end


def _ask(ends: list[tuple[BaseProcess, Connection]]) -> list[str]:
    for _, end in ends:
        end.send(True)
    return [end.recv() for _, end in ends]


def _work(rank: int, folder: Path, sizes: tuple[int, int], end: Connection) -> None:
    """Evaluate this process's share whenever the other end asks for it."""
    torch.set_num_threads(1)
    annotations, detections = synthetic_evaluation(*sizes)
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=NUM_PROCESSES)
    end.send("ready")
    while end.recv():
        end.send(_evaluate(annotations, detections, rank=rank, step=NUM_PROCESSES))
    end.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)  # kB on Linux
    dist.destroy_process_group()


def _evaluate(annotations: AnnotationSet, detections: Detections, *, rank: int, step: int) -> str:
    evaluator = CocoEvaluator(annotations)
    for indices in torch.arange(rank, len(annotations), step).split(BATCH_SIZE):
        evaluator.update(indices, Detections(*(tensor[indices] for tensor in detections)))
    return repr((evaluator.compute(), evaluator.per_class()))

"""Workers do not outlive the process that started them, nor keep it from ending."""

import os
import subprocess
import sys

import pytest

LEFT_OPEN = """
import torch
from torch.utils.data import DataLoader

from onestage.data.worker_watch import WorkerWatch

watch = WorkerWatch(2)
start = watch.start_function(None)
loader = DataLoader(torch.arange(100), num_workers=2, worker_init_fn=start, persistent_workers=True)
iterator = iter(loader)
batches = watch.batches(iterator)
print(int(next(batches)), *(worker.pid for worker in iterator._workers))
{end}
"""

# Lost without a word to its workers, as where an exception cuts a training off.
LOST = """
iterator._shutdown_workers = lambda: None
batches.close()
loader.worker_init_fn = None
del watch, start, batches
"""


@pytest.mark.parametrize("end", ["", LOST], ids=["left open", "lost"])
def test_a_process_ends_although_an_iterator_was_never_closed(end: str) -> None:
    words = [sys.executable, "-c", LEFT_OPEN.format(end=end)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    first, *workers = done.stdout.split()
    assert first == "0"
    assert len(workers) == 2
    for worker in workers:
        with pytest.raises(ProcessLookupError):
            os.kill(int(worker), 0)

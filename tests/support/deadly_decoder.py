"""A decoding child that some images kill; replaces the real one in tests."""

import os
import signal
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection

from onestage.doctor.decoding import READY, Task


def decode_each(answers: Connection, tasks: Sequence[Task]) -> None:
    """Die at "kill", sleep at "sleep", report "bad", and pass everything else."""
    answers.send(READY)
    for task in tasks:
        if task.path == "kill":
            os.kill(os.getpid(), signal.SIGSEGV)
        if task.path == "sleep":
            time.sleep(60)
        answers.send("bad: is torn.\nReplace it." if task.path == "bad" else "")
    answers.close()

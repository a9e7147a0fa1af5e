"""A decoding child that some images kill; run by test_doctor.py in place of the real one."""

import os
import signal
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection

from onestage.doctor.decoder_child import READY, Task


def decode_each(answers: Connection, tasks: Sequence[Task]) -> None:
    """Die at what is called kill, sleep at sleep, complain at bad, and pass all else."""
    answers.send(READY)
    for task in tasks:
        if task.path == "kill":
            os.kill(os.getpid(), signal.SIGSEGV)
        if task.path == "sleep":
            time.sleep(60)
        answers.send("bad: is torn.\nReplace it." if task.path == "bad" else "")
    answers.close()

"""A decoder that some images kill; replaces the real one in tests."""

import os
import signal
import time

from onestage.doctor.decoding import Task


def problem_of(task: Task) -> str:
    """Die at "kill", hang at "sleep" until the alarm, report "bad", and pass everything else."""
    if task[0] == "kill":
        os.kill(os.getpid(), signal.SIGSEGV)
    if task[0] == "sleep":
        signal.alarm(1)
        time.sleep(60)
    return "bad: is torn.\nReplace it." if task[0] == "bad" else ""

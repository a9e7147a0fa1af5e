"""Processes that train together end together: who is left says which one was lost, instead of waiting for it."""

import contextlib
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from onestage.errors import ConfigError, ProcessLostError
from onestage.reliability.standstill import Standstill

LOOK_SECONDS = 1.0
STOPPED_SECONDS = 10.0  # a process of this machine that stands still this long is lost
RESTARTS = {"fit": "The last checkpoint is whole: go on with --resume auto."}
RESTART = "Checkpoints are as they were; begin the evaluation again."
SILENT_SECONDS = 120.0  # one of another machine that says nothing; a long call into C keeps a process from speaking

LAUNCHER = "ONESTAGE_LAUNCHER"  # in the environment: the process that starts the others of its machine

_generation = 0  # of watchdogs in this process; every process starts them in the same order
_has_company = threading.Event()  # a watchdog has begun; before it, only who started this process is known


class Peer(NamedTuple):
    """Another process of the run."""

    rank: int
    host: str
    process: int

    def __str__(self) -> str:
        return f"process {self.rank} (pid {self.process} on {self.host})"


class Watchdog(Callback):
    """Watches the other processes of a distributed run while a trainer call lasts.

    torch waits half an hour for a process that hangs, and says of one that died that a connection was closed. A thread
    looks every second at the processes of its own machine, dead or stopped, and listens for a sign of life of those on
    others. When one is lost, every process that is left names it and ends with the exit code of `ProcessLostError`.
    A process that is asleep for too long, in a deadlock or a file system that does not answer, ends itself.

    Args:
        patience_seconds: how long a process of several may stand still, using no processor, outside of torch;
            0: for ever. Must be longer than the disk takes to force a checkpoint to itself.

    Raises:
        ConfigError: the patience is negative or NaN.
    """

    def __init__(self, patience_seconds: float = 20.0) -> None:
        if not patience_seconds >= 0:
            raise ConfigError(
                f"patience_seconds is {patience_seconds}; it is a number of seconds, or 0 for endless patience.\n"
                "Leave watchdog.patience_seconds at 20."
            )
        self.patience_seconds = patience_seconds or math.inf
        self._thread: _Watch | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Make the processes known to each other and begin to watch."""
        if trainer.world_size == 1 or self._thread is not None:
            return
        global _generation
        _generation += 1
        store: Any = PrefixStore(f"watchdog/{_generation}", _get_default_store().clone())
        store.set_timeout(timedelta(seconds=LOOK_SECONDS * 5))
        store.set(f"who/{trainer.global_rank}", f"{socket.gethostname()} {os.getpid()}")
        store.set(f"beat/{trainer.global_rank}", "0")
        trainer.strategy.barrier("watchdog")
        self._thread = _Watch(store, trainer.global_rank, trainer.world_size, RESTARTS.get(stage, RESTART))
        self._thread.patience_seconds = self.patience_seconds
        self._thread.start()
        _has_company.set()
        _relieve_observer(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Stop watching: an error of this process is its own to tell."""
        if not is_connection_lost(exception):
            self._stop()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Stop watching."""
        self._stop()

    def _stop(self) -> None:
        if self._thread is not None:
            self._thread.leave()
            self._thread = None


@contextlib.contextmanager
def launcher_watched() -> Iterator[None]:
    """End a process that Lightning has started when the one that started it is gone, until a watchdog watches all.

    It would look for the others for half an hour. Lightning observes those it has started, but they do not observe it.
    """
    launcher = os.environ.get(LAUNCHER)
    if launcher is not None and os.environ.get("LOCAL_RANK", "0") != "0":
        threading.Thread(target=_follow, args=(int(launcher),), name="launcher watch", daemon=True).start()
        yield
        return
    os.environ[LAUNCHER] = str(os.getpid())
    try:
        yield
    finally:
        del os.environ[LAUNCHER]


def _follow(launcher: int) -> None:
    while not _has_company.wait(LOOK_SECONDS):
        if os.getppid() != launcher:
            os.write(2, f"error: process {launcher} died, which started this one, so this one ends too.\n".encode())
            os._exit(ProcessLostError.exit_code)


def _relieve_observer(trainer: pl.Trainer) -> None:
    """Let Lightning's observer of the processes it started find none: it kills all without a word to the user."""
    launcher = trainer.strategy.launcher
    if isinstance(launcher, _SubprocessScriptLauncher):
        observed, launcher.procs = launcher.procs, list(launcher.procs)
        observed.clear()  # the observer looks at this very list; the launcher has its own from now on


class _Watch(threading.Thread):
    def __init__(self, store: Any, rank: int, world_size: int, remedy: str = RESTART) -> None:
        super().__init__(name="watchdog", daemon=True)
        self._store = store
        self._rank = rank
        self._remedy = remedy
        self.patience_seconds = math.inf
        self._others = [one for one in range(world_size) if one != rank]
        self._peers = [Peer(one, *_host_and_process(store.get(f"who/{one}"))) for one in self._others]
        self._is_over = threading.Event()
        self._beats: dict[int, tuple[bytes, float]] = {}  # of each other rank: what it said last, and when
        self._still_since: dict[int, float] = {}

    def leave(self) -> None:
        """Tell the others that this process ends in order."""
        self._is_over.set()
        with contextlib.suppress(Exception):  # the store may be gone already, and then nobody reads it
            self._store.set(f"beat/{self._rank}", "left")

    def run(self) -> None:
        """Look until the trainer call is over."""
        count = 0
        here = socket.gethostname()
        standstill = Standstill({peer.process for peer in self._peers if peer.host == here})
        while not self._is_over.wait(LOOK_SECONDS):
            count += 1
            reachable = self._talk(count)
            for peer in self._peers:
                reason = self._loss_of(peer, reachable)
                if reason is not None and not self._is_over.is_set():
                    _end(peer, reason, self._remedy)
            seconds, place = standstill.look()
            if seconds > self.patience_seconds and not self._is_over.is_set():
                own = Peer(self._rank, here, os.getpid())
                slow = "If it was only slow, raise watchdog.patience_seconds.\n"
                _end(own, f"has stood still for {seconds:.0f} s at {place}", slow + self._remedy)

    def _talk(self, count: int) -> bool:
        try:
            self._store.set(f"beat/{self._rank}", str(count))
            beats = self._store.multi_get([f"beat/{one}" for one in self._others])
        except Exception:  # torch raises several kinds; which process it is, the next look at them says
            return False
        now = time.monotonic()
        for rank, beat in zip(self._others, beats, strict=True):
            if self._beats.get(rank, (b"", 0.0))[0] != beat:
                self._beats[rank] = (beat, now)
        return True

    def _loss_of(self, peer: Peer, reachable: bool) -> str | None:
        """Why a process counts as lost, or None."""
        beat, heard = self._beats.get(peer.rank, (b"", time.monotonic()))
        if beat == b"left":
            return None
        if peer.host != socket.gethostname():
            silent = time.monotonic() - heard
            return f"has given no sign of life for {silent:.0f} s" if reachable and silent > SILENT_SECONDS else None
        state = process_state(peer.process)
        if state in ("", "Z", "X"):
            return "died"
        if state not in ("T", "t"):
            self._still_since.pop(peer.rank, None)
            return None
        still = time.monotonic() - self._still_since.setdefault(peer.rank, time.monotonic())
        return f"has stood still for {still:.0f} s" if still > STOPPED_SECONDS else None


def process_state(process: int) -> str:
    """The state of a process of this machine: R, S or D alive, T stopped, Z dead, as ps prints; "" if there is none."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        if Path("/proc/self").exists():
            return ""
    except (OSError, IndexError):
        return "R"
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass
    return "R"


def is_connection_lost(error: BaseException) -> bool:
    """Whether torch says that another process is gone, in the words of gloo, NCCL or the store."""
    text = str(error).lower()
    words = ("connection closed by peer", "connection reset", "broken pipe", "socket error", "remote process")
    return isinstance(error, RuntimeError) and any(word in text for word in words)


def wait_to_be_named() -> NoReturn:
    """After a lost connection: give the watchdog the time to say which process it was; it ends this one too.

    Raises:
        ProcessLostError: it could not tell.
    """
    time.sleep(5 * LOOK_SECONDS)
    raise ProcessLostError(
        "another process of the run closed its connection; its own message, above or in its log, says why.\n"
        "Correct that, and go on: a training with --resume auto."
    )


def _host_and_process(value: bytes) -> tuple[str, int]:
    host, _, process = value.decode().rpartition(" ")
    return host, int(process)


def _end(peer: Peer, reason: str, remedy: str) -> NoReturn:
    message = f"error: {peer} {reason}; without it nothing goes on, so this process ends too.\n{remedy}\n"
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    os.write(2, message.encode())
    if peer.host == socket.gethostname() and process_state(peer.process) in ("T", "t"):
        with contextlib.suppress(OSError):
            os.kill(peer.process, signal.SIGKILL)  # stopped, it would hold its memory and its GPU for ever
    os._exit(ProcessLostError.exit_code)  # the main thread waits in a call that never returns

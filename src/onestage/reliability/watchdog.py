"""End all processes of a distributed run when one is lost, and name it."""

import contextlib
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

# Private: torch offers no public way to the store that the processes of a run already share.
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from onestage.errors import ProcessLostError

CHECK_SECONDS = 1.0
DEAD_SECONDS = 2.0  # a process that ended in order has said so by then
STOPPED_SECONDS = 10.0  # a process of this machine that is stopped this long is lost
SILENT_SECONDS = 120.0  # a process of another machine that sends nothing; a long call into C delays a heartbeat
REMEDY = "Checkpoints are unchanged; start the evaluation again."
FIT_REMEDY = "The last checkpoint is complete: continue with --resume auto."
LAUNCHER = "ONESTAGE_LAUNCHER"  # in the environment: the process that starts the others of its machine

_generation = 0  # of watch threads in this process; every process starts them in the same order
_thread: "WatchThread | None" = None
_watchdog_started = threading.Event()  # before it, a process knows only the one that started it


class Peer(NamedTuple):
    """Another process of the run."""

    rank: int
    host: str
    process: int

    def __str__(self) -> str:
        return f"process {self.rank} (pid {self.process} on {self.host})"


class Watchdog(Callback):
    """Watch the other processes of a distributed run, from the first trainer call to the end of the command.

    A thread checks the processes of its machine (dead or stopped) and the heartbeats of the others. When one is lost,
    every other process names it and ends, instead of waiting half an hour for it.
    """

    def setup(self, trainer: pl.Trainer, module: Any, stage: str) -> None:
        """Exchange the addresses of the processes and start to watch them."""
        global _generation, _thread
        if trainer.world_size == 1 or _thread is not None:
            return
        _generation += 1
        store: Any = PrefixStore(f"watchdog/{_generation}", _get_default_store().clone())
        store.set_timeout(timedelta(seconds=CHECK_SECONDS * 5))
        store.set(f"who/{trainer.global_rank}", f"{socket.gethostname()} {os.getpid()}")
        store.set(f"beat/{trainer.global_rank}", "0")
        trainer.strategy.barrier("watchdog")
        remedy = FIT_REMEDY if stage == "fit" else REMEDY
        _thread = WatchThread(store, trainer.global_rank, trainer.world_size, remedy)
        _thread.start()
        _watchdog_started.set()
        launcher: Any = trainer.strategy.launcher
        if observed := getattr(launcher, "procs", None):
            launcher.procs = list(observed)
            observed.clear()  # the very list of Lightning's observer, which kills all without a message


class WatchThread(threading.Thread):
    """Check the other processes until `leave` is called."""

    def __init__(self, store: Any, rank: int, world_size: int, remedy: str = REMEDY) -> None:
        super().__init__(name="watchdog", daemon=True)
        self._store, self._rank, self._remedy = store, rank, remedy
        ranks = [other for other in range(world_size) if other != rank]
        places = {other: store.get(f"who/{other}").decode().rpartition(" ") for other in ranks}
        self.peers = [Peer(other, host, int(process)) for other, (host, _, process) in places.items()]
        self._is_over = threading.Event()
        self._beats = dict.fromkeys(ranks, (b"", time.monotonic()))  # the last heartbeat, and when it changed
        self._gone_since: dict[int, float] = {}

    def leave(self) -> None:
        """Tell the others that this process ends in order."""
        self._is_over.set()
        with contextlib.suppress(Exception):  # the store may be gone already, and then nobody reads it
            self._store.set(f"beat/{self._rank}", "left")

    def run(self) -> None:
        """Check until the trainer call is over."""
        threading.Thread(target=self._exchange_beats, daemon=True).start()
        while not self._is_over.wait(CHECK_SECONDS):
            for peer in self.peers:
                reason = self.loss_of(peer)
                if reason is not None and not self._is_over.is_set():
                    _end(peer, reason, self._remedy)

    def _exchange_beats(self) -> None:
        while not self._is_over.wait(CHECK_SECONDS):
            self.exchange_beat()

    def exchange_beat(self) -> None:
        """Send a heartbeat and read those of the others; a stopped host blocks this."""
        try:
            self._store.set(f"beat/{self._rank}", str(time.monotonic()))
            beats = self._store.multi_get([f"beat/{peer.rank}" for peer in self.peers])
        except Exception:  # torch raises several kinds; the check of the peers names the lost process
            return
        now = time.monotonic()
        for peer, beat in zip(self.peers, beats, strict=True):
            if self._beats[peer.rank][0] != beat:
                self._beats[peer.rank] = (beat, now)

    def loss_of(self, peer: Peer) -> str | None:
        """Return why a process counts as lost, or None."""
        beat, changed = self._beats[peer.rank]
        if beat == b"left":
            return None
        now = time.monotonic()
        if peer.host != socket.gethostname():
            is_silent = now - changed > SILENT_SECONDS  # also if the store, on the machine of rank 0, is silent
            return f"has given no sign of life for {now - changed:.0f} s" if is_silent else None
        state = process_state(peer.process)
        if state not in ("", "Z", "X", "T", "t"):
            self._gone_since.pop(peer.rank, None)
            return None
        seconds = now - self._gone_since.setdefault(peer.rank, now)
        if state in ("T", "t"):
            return f"has been stopped for {seconds:.0f} s" if seconds > STOPPED_SECONDS else None
        return "died" if seconds > DEAD_SECONDS else None


def _end(peer: Peer, reason: str, remedy: str) -> NoReturn:
    message = f"error: {peer} {reason}; the run cannot continue without it, so this process ends too.\n{remedy}\n"
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    os.write(2, message.encode())
    if peer.host == socket.gethostname() and process_state(peer.process) in ("T", "t"):
        with contextlib.suppress(OSError):
            os.kill(peer.process, signal.SIGKILL)  # stopped, it would hold its memory and its GPU for ever
    os._exit(ProcessLostError.exit_code)  # the main thread waits in a call that never returns


def process_state(process: int) -> str:
    """Return the state of a local process as ps prints it; "" if it is gone."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "" if Path("/proc/self").exists() else "R"  # macOS has no /proc: a lost process is not noticed there
    except (OSError, IndexError):
        return "R"


def is_connection_lost(error: BaseException) -> bool:
    """Return whether gloo, NCCL or the store report that another process is gone."""
    words = ("connection closed by peer", "connection reset", "broken pipe", "socket error", "remote process")
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)


def await_watchdog_verdict() -> NoReturn:
    """Let the watchdog name the lost process, or raise ProcessLostError."""
    time.sleep(5 * CHECK_SECONDS)
    raise ProcessLostError(
        "another process of the run closed its connection; its own message gives the reason.\n"
        "Correct that and continue: a training with --resume auto."
    )


@contextlib.contextmanager
def processes_watched() -> Iterator[None]:
    """Let the watchdog watch until the end of the command; end with the parent if Lightning started this process."""
    global _thread
    launcher = os.environ.get(LAUNCHER)
    is_child = launcher is not None and os.environ.get("LOCAL_RANK", "0") != "0"
    if is_child:
        threading.Thread(target=_watch_parent, args=(int(str(launcher)),), name="launcher watch", daemon=True).start()
    else:
        os.environ[LAUNCHER] = str(os.getpid())
    try:
        yield
    finally:
        if _thread is not None:
            _thread.leave()
            _thread = None
        if not is_child:
            del os.environ[LAUNCHER]


def _watch_parent(launcher: int) -> None:
    while not _watchdog_started.wait(CHECK_SECONDS):
        if os.getppid() != launcher:
            os.write(2, f"error: process {launcher}, which started this one, died, so this one ends too.\n".encode())
            os._exit(ProcessLostError.exit_code)

"""The watchdog: which processes count as dead, stopped or silent, and which errors mean a lost process."""

import importlib
import inspect
import os
import re
import signal
import threading
import time
from collections.abc import Iterator

import pytest
from processes import finish, start

from onestage.errors import ProcessLostError
from onestage.reliability import watchdog
from onestage.reliability.watchdog import Peer, WatchThread, await_watchdog_verdict, is_connection_lost, process_state


@pytest.fixture
def child() -> Iterator[int]:
    process = os.fork()
    if process == 0:
        time.sleep(600)
        os._exit(0)
    yield process
    try:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    except (ProcessLookupError, ChildProcessError):
        pass


def wait_for(process: int, states: str) -> str:
    deadline = time.monotonic() + 120
    while process_state(process) not in states and time.monotonic() < deadline:
        time.sleep(0.01)
    return process_state(process)


class Store:
    """The store of torch.distributed, in which the one other process sends `beats`."""

    def __init__(self, host: str, process: int) -> None:
        self.who = f"{host} {process}".encode()
        self.beats = b"0"
        self.answers = threading.Event()
        self.answers.set()

    def get(self, key: str) -> bytes:
        return self.who

    def set(self, key: str, value: str) -> None:
        self.answers.wait()

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return [self.beats for _ in keys]


def loss(watch: WatchThread) -> str | None:
    watch.exchange_beat()
    return watch.loss_of(watch.peers[0])


def test_stopped_process_of_this_machine_is_lost_after_a_while(child, monkeypatch):
    watch = WatchThread(Store(watchdog.socket.gethostname(), child), rank=0, world_size=2)
    assert watch.peers == [Peer(1, watchdog.socket.gethostname(), child)]
    assert loss(watch) is None
    os.kill(child, signal.SIGSTOP)
    wait_for(child, "T")
    assert loss(watch) is None
    monkeypatch.setattr(watchdog, "STOPPED_SECONDS", -1)
    assert "has been stopped for" in str(loss(watch))
    os.kill(child, signal.SIGCONT)
    wait_for(child, "S")
    assert loss(watch) is None


def test_silent_process_of_another_machine_is_lost_unless_it_ended_in_order(monkeypatch):
    store = Store("elsewhere", 1)
    watch = WatchThread(store, rank=0, world_size=2)
    assert loss(watch) is None
    monkeypatch.setattr(watchdog, "SILENT_SECONDS", -1)
    assert "no sign of life" in str(loss(watch))
    store.beats = b"left"
    assert loss(watch) is None


def test_store_that_blocks_does_not_hide_a_dead_process(child, monkeypatch):
    """A stopped process 0 hosts the store: a call of the store never returns."""
    store, ended = Store(watchdog.socket.gethostname(), child), threading.Event()
    monkeypatch.setattr(watchdog, "CHECK_SECONDS", 0.01)
    monkeypatch.setattr(watchdog, "DEAD_SECONDS", 0.0)
    monkeypatch.setattr(watchdog, "_end", lambda peer, reason, remedy: ended.set())
    store.answers.clear()
    watch = WatchThread(store, rank=1, world_size=2)
    watch.start()
    os.kill(child, signal.SIGKILL)
    assert ended.wait(60)
    store.answers.set()
    watch.leave()


@pytest.mark.parametrize(
    ("error", "is_lost"),
    [
        (RuntimeError("[..pair.cc:538] Connection closed by peer [127.0.0.1]:4711"), True),
        (RuntimeError("NCCL error: remote process exited or there was a network error"), True),
        (RuntimeError("size mismatch"), False),
        (ValueError("Connection closed by peer"), False),
    ],
)
def test_lost_connection_is_distinguished_from_other_errors(error, is_lost):
    assert is_connection_lost(error) == is_lost


def test_unexplained_lost_connection_ends_with_the_code_of_a_lost_process(monkeypatch):
    monkeypatch.setattr(watchdog, "CHECK_SECONDS", 0.0)
    with pytest.raises(ProcessLostError, match="--resume auto"):
        await_watchdog_verdict()


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "is_launcher_alive", "code"), [("1", True, 0), ("1", False, 7), ("0", False, 0)])
def test_process_that_lightning_started_ends_with_its_parent(rank, is_launcher_alive, code):
    """Process 0 was started by no command of ours: its variable comes from a run around it."""
    program = (
        "import time; from onestage.reliability import watchdog; watchdog.CHECK_SECONDS = 0.1\n"
        "with watchdog.processes_watched(): time.sleep(3)"
    )
    launcher = str(os.getpid() if is_launcher_alive else 2**22 + 1)  # above Linux's largest process number
    _, err = finish(start("-c", program, environment={watchdog.LAUNCHER: launcher, "LOCAL_RANK": rank}), code)
    assert ("which started this one, died" in err) == (code != 0)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("torch.distributed.distributed_c10d", "_get_default_store"),  # watchdog.py: the store that all processes share
        ("lightning.pytorch.strategies.launchers", "_SubprocessScriptLauncher.procs"),  # processes it has started
        ("lightning.pytorch.strategies", "FSDPStrategy._state_dict_type"),  # add_on.py: whole or sharded checkpoints
        ("lightning.pytorch.trainer.connectors.checkpoint_connector", "_CheckpointConnector.restore"),  # stopping.py
        ("lightning.pytorch.loops.progress", "_ProcessedTracker.processed"),  # callbacks.py: progress in a checkpoint
        ("lightning.pytorch.cli", "LightningCLI._instantiate_trainer"),  # cli/commands.py overrides these
        ("lightning.pytorch.cli", "LightningCLI._prepare_subcommand_kwargs"),
        ("lightning.pytorch.cli", "LightningCLI._run_subcommand"),
        ("lightning.pytorch.cli", "LightningCLI._parse_ckpt_path"),
        ("lightning.pytorch.cli", "LightningCLI._dump_config"),
        ("lightning.pytorch.cli", "LightningCLI._subcommand_parsers"),
    ],
)
def test_private_name_of_a_library_still_exists(module, name):
    owner, _, attribute = name.rpartition(".")
    library = importlib.import_module(module)
    assert hasattr(library, owner or name)
    if owner:  # a method, or an attribute that the class sets
        assert re.search(rf"\b{attribute}\b", inspect.getsource(getattr(library, owner)))

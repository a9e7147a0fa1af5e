"""What the watchdog takes for dead, stopped or alive, and which errors mean that another process is gone."""

import os
import signal
import subprocess
import sys
import time

import pytest

from onestage.errors import ConfigError, ProcessLostError
from onestage.reliability import watchdog
from onestage.reliability.watchdog import Peer, Watchdog, _Watch, is_connection_lost, process_state, wait_to_be_named


@pytest.fixture
def child() -> int:
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


def test_a_process_is_alive_stopped_dead_or_gone(child: int) -> None:
    assert process_state(os.getpid()) == "R"
    assert wait_for(child, "S") == "S"
    os.kill(child, signal.SIGSTOP)
    assert wait_for(child, "T") == "T"
    os.kill(child, signal.SIGKILL)
    assert wait_for(child, "Z") == "Z"
    os.waitpid(child, 0)
    assert process_state(child) == ""


class Store:
    """The store of torch.distributed, of which one process answers `beats`."""

    def __init__(self, host: str, process: int) -> None:
        self.who = f"{host} {process}".encode()
        self.beats = b"0"

    def get(self, key: str) -> bytes:
        return self.who

    def set(self, key: str, value: str) -> None:
        pass

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return [self.beats for _ in keys]


def loss(watch: _Watch) -> str | None:
    (peer,) = watch._peers
    return watch._loss_of(peer, watch._talk(1))


def test_one_that_stands_still_on_this_machine_is_lost_after_a_while(
    child: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = _Watch(Store(watchdog.socket.gethostname(), child), rank=0, world_size=2)
    assert watch._peers == [Peer(1, watchdog.socket.gethostname(), child)]
    assert loss(watch) is None
    os.kill(child, signal.SIGSTOP)
    wait_for(child, "T")
    assert loss(watch) is None
    monkeypatch.setattr(watchdog, "STOPPED_SECONDS", -1)
    assert "has stood still" in str(loss(watch))
    os.kill(child, signal.SIGCONT)
    wait_for(child, "S")
    assert loss(watch) is None


@pytest.mark.parametrize("seconds", [-1.0, float("nan")])
def test_an_impossible_patience_is_refused(seconds: float) -> None:
    with pytest.raises(ConfigError, match=r"patience_seconds.*20"):
        Watchdog(seconds)


def test_no_patience_given_is_endless() -> None:
    assert Watchdog(0).patience_seconds == float("inf")


def test_one_on_another_machine_is_lost_when_it_gives_no_sign_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store("elsewhere", 1)
    watch = _Watch(store, rank=0, world_size=2)
    assert loss(watch) is None
    monkeypatch.setattr(watchdog, "SILENT_SECONDS", -1)
    assert "no sign of life" in str(loss(watch))
    store.beats = b"left"  # it has ended in order
    assert loss(watch) is None


@pytest.mark.parametrize(
    ("error", "is_lost"),
    [
        (RuntimeError("[..pair.cc:538] Connection closed by peer [127.0.0.1]:4711"), True),
        (RuntimeError("NCCL error: remote process exited or there was a network error"), True),
        (RuntimeError("size mismatch"), False),
        (ValueError("Connection closed by peer"), False),
    ],
)
def test_a_lost_connection_is_told_from_other_errors(error: Exception, is_lost: bool) -> None:
    assert is_connection_lost(error) == is_lost


def test_a_lost_connection_that_nobody_explains_ends_with_the_code_of_a_lost_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watchdog, "LOOK_SECONDS", 0.0)
    with pytest.raises(ProcessLostError, match="--resume auto"):
        wait_to_be_named()


@pytest.mark.parametrize(("rank", "is_launcher_alive", "code"), [("1", True, 0), ("1", False, 7), ("0", False, 0)])
def test_a_process_that_lightning_has_started_ends_with_the_one_that_started_it(
    rank: str, is_launcher_alive: bool, code: int
) -> None:
    """Process 0 of several is started by nobody of ours: the variable is what a run around it has left."""
    program = (
        "import time; from onestage.training import watchdog; watchdog.LOOK_SECONDS = 0.1\n"
        "with watchdog.launcher_watched(): time.sleep(3)"
    )
    launcher = str(os.getpid() if is_launcher_alive else 2**22 + 1)  # more than Linux numbers processes up to
    environment = {**os.environ, watchdog.LAUNCHER: launcher, "LOCAL_RANK": rank}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == code, done.stderr
    assert ("died, which started this one" in done.stderr) == (code != 0)

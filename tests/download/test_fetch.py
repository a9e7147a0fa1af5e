"""Downloads of one file from a local server that misbehaves."""

import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from onestage.download import fetch as fetch_module
from onestage.download.fetch import RemoteFile, fetch
from onestage.errors import DataError

CONTENT = bytes(range(256)) * 800  # 200 KB
Behaviour = Callable[["Handler"], None]


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch_module, "ATTEMPTS", 3)
    monkeypatch.setattr(fetch_module, "WAIT_SECONDS", 0.01)


class Handler(BaseHTTPRequestHandler):
    """Answer each request with the next of the server's behaviours; repeat the last one."""

    def do_GET(self) -> None:
        self.server.requests.append((self.path, self.headers.get("Range")))
        behaviours = self.server.behaviours
        behaviour = behaviours.pop(0) if len(behaviours) > 1 else behaviours[0]
        behaviour(self)

    def log_message(self, *_: object) -> None:
        pass

    def begin(self, status: int, num_bytes: int | None, **headers: str) -> None:
        self.send_response(status)
        if num_bytes is not None:
            self.send_header("Content-Length", str(num_bytes))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()


def send(content: bytes = CONTENT, num_bytes: int | None = None) -> Behaviour:
    """Send the requested range, cut after `num_bytes`."""

    def behave(handler: Handler) -> None:
        asked = handler.headers.get("Range")
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
        if asked and start >= len(content):
            handler.begin(416, 0)
            return
        headers = {"Content_Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if asked else {}
        handler.begin(206 if asked else 200, len(content) - start, **headers)
        handler.wfile.write(content[start : None if num_bytes is None else start + num_bytes])

    return behave


def answer(status: int, body: bytes = b"", **headers: str) -> Behaviour:
    def behave(handler: Handler) -> None:
        handler.begin(status, len(body), **headers)
        handler.wfile.write(body)

    return behave


def stall(handler: Handler) -> None:
    handler.begin(200, len(CONTENT))
    handler.wfile.write(CONTENT[:1000])
    handler.server.released.wait(60)


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.requests, httpd.behaviours, httpd.released = [], [send()], threading.Event()
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield httpd
    httpd.released.set()
    httpd.shutdown()
    httpd.server_close()
    thread.join()


def download(server: ThreadingHTTPServer, folder: Path, *servers: str, mirrors: tuple[str, ...] = ()) -> bytes:
    url = f"http://127.0.0.1:{server.server_address[1]}"
    urls = tuple(f"{url}{path}" for path in servers or ("",))
    remote = RemoteFile("data.tar", urls, hashlib.md5(CONTENT).hexdigest(), len(CONTENT))
    return fetch(remote, folder, mirrors).read_bytes()


def ranges(server: ThreadingHTTPServer) -> list[str | None]:
    return [asked for _, asked in server.requests]


def test_complete_file_is_not_requested_again(server, tmp_path):
    assert download(server, tmp_path) == CONTENT
    assert download(server, tmp_path) == CONTENT
    assert ranges(server) == [None]
    assert [path.name for path in tmp_path.iterdir()] == ["data.tar"]


def test_cut_connections_continue_where_they_stopped(server, tmp_path):
    server.behaviours = [*[send(num_bytes=30_000)] * 5, send()]  # more cuts than attempts: each made progress
    assert download(server, tmp_path) == CONTENT
    assert ranges(server) == [None, *(f"bytes={30_000 * n}-" for n in range(1, 6))]


def test_next_run_continues_where_the_last_one_gave_up(server, tmp_path):
    server.behaviours = [send(num_bytes=50_000), answer(500)]
    with pytest.raises(DataError, match=r"(?s)500.*to continue the download, or put data\.tar into"):
        download(server, tmp_path)
    assert [(path.name, path.stat().st_size) for path in tmp_path.iterdir()] == [("data.tar.part", 50_000)]
    server.behaviours = [send()]
    assert download(server, tmp_path) == CONTENT
    assert ranges(server)[-1] == "bytes=50000-"


def test_silent_server_is_asked_again_for_the_rest(server, tmp_path, monkeypatch):
    server.behaviours = [stall, send()]
    monkeypatch.setattr(fetch_module, "TIMEOUT_SECONDS", 1.0)
    assert download(server, tmp_path) == CONTENT
    assert ranges(server) == [None, "bytes=1000-"]


@pytest.mark.parametrize("part", [CONTENT, CONTENT + b"more", b"other" * 40_000, b"other", CONTENT[:100]])
@pytest.mark.parametrize("behaviour", [send(), answer(200, CONTENT)])  # the second server cannot resume
def test_part_of_this_or_another_file_leads_to_the_whole_file(server, tmp_path, part, behaviour):
    (tmp_path / "data.tar.part").write_bytes(part)
    server.behaviours = [behaviour]
    assert download(server, tmp_path) == CONTENT


def test_damaged_file_is_fetched_once_more_and_never_kept(server, tmp_path):
    (tmp_path / "data.tar").write_bytes(b"an earlier file with a wrong checksum")
    server.behaviours = [send(CONTENT[:-1] + b"?"), send()]
    assert download(server, tmp_path) == CONTENT
    (tmp_path / "data.tar").unlink()
    server.behaviours, server.requests = [send(CONTENT[:-1] + b"?")], []
    with pytest.raises(DataError, match="the checksum is wrong"):
        download(server, tmp_path)
    assert ranges(server) == [None, None]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("behaviour", "message", "num_requests"),
    [
        (answer(404), "answers 404", 1),
        (answer(500), "answers 500", 3),
        (answer(200, b"<!DOCTYPE html><html>Log in</html>"), "the file is damaged or another one", 2),
        (send(num_bytes=0), "the connection was cut after 0 of 204800 bytes", 3),
        (answer(302, Location="file:///etc/passwd"), "answers 302", 3),
        (lambda handler: handler.server.released.wait(60), "no byte within 0.2 s", 3),
    ],
)
def test_answer_without_the_file_is_reported(server, tmp_path, monkeypatch, behaviour, message, num_requests):
    server.behaviours = [behaviour]
    if message.startswith("no byte"):
        monkeypatch.setattr(fetch_module, "TIMEOUT_SECONDS", 0.2)
    with pytest.raises(DataError, match=message):
        download(server, tmp_path)
    assert len(server.requests) == num_requests or "302" in message
    assert not (tmp_path / "data.tar").exists()


def test_redirect_keeps_the_range(server, tmp_path):
    (tmp_path / "data.tar.part").write_bytes(CONTENT[:10])
    server.behaviours = [answer(302, Location="/elsewhere"), send()]
    assert download(server, tmp_path) == CONTENT
    assert server.requests == [("/data.tar", "bytes=10-"), ("/elsewhere", "bytes=10-")]


def test_mirror_comes_first_and_the_next_server_continues(server, tmp_path):
    server.behaviours = [send(num_bytes=500), answer(404), send()]
    mirror = f"http://127.0.0.1:{server.server_address[1]}/mirror/"
    assert download(server, tmp_path, "/official", mirrors=(mirror,)) == CONTENT
    assert [path for path, _ in server.requests] == ["/mirror/data.tar", "/mirror/data.tar", "/official/data.tar"]
    assert ranges(server) == [None, "bytes=500-", "bytes=500-"]


def test_unreachable_servers_are_all_named(tmp_path):
    remote = RemoteFile("zips/a.zip", ("http://127.0.0.1:9/x", "http://127.0.0.1:9/y"), "0" * 32, 100)
    with pytest.raises(DataError, match=r"(?s)9/x/zips/a\.zip: .*refused.*9/y/zips/a\.zip: .*put a\.zip into"):
        fetch(remote, tmp_path)


def test_progress_is_reported_and_waits_double(server, tmp_path, monkeypatch, capsys):
    monkeypatch.undo()  # patient again
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    monkeypatch.setattr(fetch_module, "REPORT_SECONDS", -1.0)
    server.behaviours = [*[answer(500)] * 4, send()]
    download(server, tmp_path)
    assert waits == [2, 4, 8, 16]
    assert capsys.readouterr().out.splitlines()[-1].startswith("data.tar: 100%, ")

import hashlib
import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from onestage.download import download as download_module
from onestage.download.download import Patience, RemoteFile, download, locked, require_space, with_mirrors
from onestage.errors import ConfigError, DataError

CONTENT = bytes(range(256)) * 800  # 200 KB
# A busy machine may keep the server of a test from answering for seconds: only where it is to be silent, that is short.
EAGER = Patience(attempts=3, wait_seconds=0.01, timeout_seconds=60.0)
IMPATIENT = EAGER._replace(timeout_seconds=1.0)
Behaviour = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    """Answers each request with the next of the server's behaviours, the last one for ever."""

    def do_GET(self) -> None:
        self.server.requests.append((self.path, self.headers.get("Range")))
        behaviours = self.server.behaviours
        behaviour = behaviours.pop(0) if len(behaviours) > 1 else behaviours[0]
        behaviour(self)

    def log_message(self, *_: object) -> None:
        pass


def begin(handler: Handler, status: int, num_bytes: int | None, **headers: str) -> None:
    handler.send_response(status)
    if num_bytes is not None:
        handler.send_header("Content-Length", str(num_bytes))
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()


def send_all(handler: Handler, content: bytes = CONTENT) -> None:
    asked = handler.headers.get("Range")
    start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
    if asked and start >= len(content):
        begin(handler, 416, 0)
        return
    end = len(content) - 1
    headers = {"Content_Range": f"bytes {start}-{end}/{len(content)}"} if asked else {}
    begin(handler, 206 if asked else 200, len(content) - start, **headers)
    handler.wfile.write(content[start:])


def cut_after(num_bytes: int) -> Behaviour:
    def behave(handler: Handler) -> None:
        asked = handler.headers.get("Range")
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
        headers = {"Content_Range": f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}"} if asked else {}
        begin(handler, 206 if asked else 200, len(CONTENT) - start, **headers)
        handler.wfile.write(CONTENT[start : start + num_bytes])

    return behave


def answer(status: int) -> Behaviour:
    return lambda handler: begin(handler, status, 0)


def stall(handler: Handler) -> None:
    begin(handler, 200, len(CONTENT))
    handler.wfile.write(CONTENT[:1000])
    handler.server.released.wait(60)


def without_ranges(handler: Handler) -> None:
    begin(handler, 200, len(CONTENT))
    handler.wfile.write(CONTENT)


def wrong_range(handler: Handler) -> None:
    begin(handler, 206, 10, Content_Range=f"bytes 5-14/{len(CONTENT)}")
    handler.wfile.write(CONTENT[5:15])


def web_page(handler: Handler) -> None:
    text = b"<!DOCTYPE html><html>Log in first</html>"
    begin(handler, 200, len(text))
    handler.wfile.write(text)


def endless(handler: Handler) -> None:
    begin(handler, 200, None)
    try:
        while True:
            handler.wfile.write(b"x" * 100_000)
    except OSError:
        pass


def redirect_to(place: str) -> Behaviour:
    return lambda handler: begin(handler, 302, 0, Location=place)


def corrupt(handler: Handler) -> None:
    send_all(handler, CONTENT[:-1] + b"?")


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.requests, httpd.behaviours, httpd.released = [], [send_all], threading.Event()
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield httpd
    httpd.released.set()
    httpd.shutdown()
    httpd.server_close()
    thread.join()


def remote(server: ThreadingHTTPServer, *paths: str) -> RemoteFile:
    urls = tuple(f"http://127.0.0.1:{server.server_address[1]}/{path}" for path in paths or ("data.tar",))
    return RemoteFile("data.tar", urls, hashlib.md5(CONTENT).hexdigest(), len(CONTENT))


def fetch(server: ThreadingHTTPServer, folder: Path, *paths: str, patience: Patience = EAGER) -> bytes:
    return download(remote(server, *paths), folder, patience=patience, report=lambda _: None).read_bytes()


def ranges(server: ThreadingHTTPServer) -> list[str | None]:
    return [asked for _, asked in server.requests]


def test_file_arrives_whole_and_is_not_asked_for_again(server: ThreadingHTTPServer, tmp_path: Path) -> None:
    assert fetch(server, tmp_path / "new") == CONTENT
    assert fetch(server, tmp_path / "new") == CONTENT
    assert ranges(server) == [None]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [".lock", "data.tar"]


def test_cut_connections_go_on_where_they_stopped(server: ThreadingHTTPServer, tmp_path: Path) -> None:
    server.behaviours = [*[cut_after(30_000)] * 5, send_all]  # more cuts than attempts: each brought something
    assert fetch(server, tmp_path) == CONTENT
    assert ranges(server) == [None, *(f"bytes={30_000 * n}-" for n in range(1, 6))]


def test_next_run_goes_on_where_the_last_one_gave_up(server: ThreadingHTTPServer, tmp_path: Path) -> None:
    server.behaviours = [cut_after(50_000), answer(500)]
    with pytest.raises(DataError, match=r"(?s)500.*goes on where it stopped"):
        fetch(server, tmp_path)
    assert (tmp_path / "data.tar.part").stat().st_size == 50_000
    assert not (tmp_path / "data.tar").exists()
    server.behaviours = [send_all]
    assert fetch(server, tmp_path) == CONTENT
    assert ranges(server)[-1] == "bytes=50000-"


def test_silent_server_is_given_up_and_asked_again(server: ThreadingHTTPServer, tmp_path: Path) -> None:
    server.behaviours = [stall, send_all]
    assert fetch(server, tmp_path, patience=IMPATIENT) == CONTENT
    assert ranges(server) == [None, "bytes=1000-"]


def test_always_silent_server_ends_with_a_message(server: ThreadingHTTPServer, tmp_path: Path) -> None:
    server.behaviours = [lambda handler: handler.server.released.wait(60)]
    with pytest.raises(DataError, match="silent for too long"):
        download(remote(server), tmp_path, patience=Patience(2, 0.01, 0.2), report=lambda _: None)


@pytest.mark.parametrize("behaviour", [without_ranges, wrong_range])
def test_server_that_cannot_resume_starts_anew(
    server: ThreadingHTTPServer, tmp_path: Path, behaviour: Behaviour
) -> None:
    (tmp_path / "data.tar.part").write_bytes(CONTENT[:100])
    server.behaviours = [behaviour, without_ranges]
    assert fetch(server, tmp_path) == CONTENT


@pytest.mark.parametrize("part", [CONTENT, CONTENT + b"more", b"other" * 40_000, b"other"])
def test_part_of_another_file_is_thrown_away(server: ThreadingHTTPServer, tmp_path: Path, part: bytes) -> None:
    (tmp_path / "data.tar.part").write_bytes(part)
    assert fetch(server, tmp_path) == CONTENT


def test_damaged_file_is_fetched_once_more(server: ThreadingHTTPServer, tmp_path: Path) -> None:
    server.behaviours = [corrupt, send_all]
    assert fetch(server, tmp_path) == CONTENT
    assert ranges(server) == [None, None]


def test_always_damaged_file_leaves_nothing(server: ThreadingHTTPServer, tmp_path: Path) -> None:
    server.behaviours = [corrupt]
    with pytest.raises(DataError, match="the checksum is wrong"):
        fetch(server, tmp_path)
    assert len(server.requests) == 2
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_complete_file_with_a_wrong_checksum_is_replaced(server: ThreadingHTTPServer, tmp_path: Path) -> None:
    (tmp_path / "data.tar").write_bytes(b"what was here before")
    assert fetch(server, tmp_path) == CONTENT


@pytest.mark.parametrize(
    ("behaviour", "message", "num_requests"),
    [
        (answer(404), "answers 404", 1),
        (answer(403), "answers 403", 1),
        (answer(500), "answers 500", 3),
        (answer(503), "answers 503", 3),
        (answer(429), "answers 429", 3),
        (answer(204), "answers 204", 3),
        (web_page, "a web page, not the file", 1),
        (endless, "far more than the file has", 1),
        (cut_after(0), "the connection was cut after 0 of", 3),
        (redirect_to("file:///etc/passwd"), "answers 302", 3),
    ],
)
def test_answers_that_are_no_file(
    server: ThreadingHTTPServer, tmp_path: Path, behaviour: Behaviour, message: str, num_requests: int
) -> None:
    server.behaviours = [behaviour]
    with pytest.raises(DataError, match=message):
        fetch(server, tmp_path)
    assert len(server.requests) == num_requests
    assert not (tmp_path / "data.tar").exists()


def test_redirect_is_followed_and_keeps_the_range(server: ThreadingHTTPServer, tmp_path: Path) -> None:
    (tmp_path / "data.tar.part").write_bytes(CONTENT[:10])
    server.behaviours = [redirect_to("/elsewhere"), send_all]
    assert fetch(server, tmp_path) == CONTENT
    assert server.requests == [("/data.tar", "bytes=10-"), ("/elsewhere", "bytes=10-")]


def test_redirects_without_end_are_given_up(server: ThreadingHTTPServer, tmp_path: Path) -> None:
    server.behaviours = [redirect_to("/data.tar")]
    with pytest.raises(DataError, match="302"):
        fetch(server, tmp_path)


def test_second_server_takes_over_where_the_first_fails(server: ThreadingHTTPServer, tmp_path: Path) -> None:
    server.behaviours = [cut_after(500), answer(404), send_all]
    assert fetch(server, tmp_path, "first/data.tar", "second/data.tar") == CONTENT
    assert server.requests[-1] == ("/second/data.tar", "bytes=500-")


def test_no_server_at_all_names_every_url_and_the_remedy(tmp_path: Path) -> None:
    gone = RemoteFile("a.zip", ("http://127.0.0.1:9/a.zip", "http://127.0.0.1:9/b.zip"), "0" * 32, 100)
    with pytest.raises(DataError, match=r"(?s)9/a\.zip: .*refused.*9/b\.zip: .*put a\.zip into"):
        download(gone, tmp_path, patience=EAGER, report=lambda _: None)


def test_mirrors_come_first_and_must_be_urls(server: ThreadingHTTPServer) -> None:
    urls = with_mirrors(remote(server), ["https://mirror.example/data/"]).urls
    assert urls == ("https://mirror.example/data/data.tar", *remote(server).urls)
    with pytest.raises(ConfigError, match="no URL of a web server"):
        with_mirrors(remote(server), ["file:///etc"])


def test_progress_is_reported(server: ThreadingHTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download_module, "REPORT_SECONDS", -1.0)
    lines: list[str] = []
    download(remote(server), tmp_path, patience=EAGER, report=lines.append)
    assert lines[-1].startswith("data.tar: 100%, ")


def hold_lock(folder: Path, is_held: object, may_end: object) -> None:
    with locked(folder):
        is_held.set()
        may_end.wait(120)


def test_second_process_is_refused_until_the_first_ends(server: ThreadingHTTPServer, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    is_held, may_end = context.Event(), context.Event()
    process = context.Process(target=hold_lock, args=(tmp_path, is_held, may_end))
    process.start()
    assert is_held.wait(120)
    with pytest.raises(DataError, match="another process is downloading"):
        fetch(server, tmp_path)
    process.kill()  # the lock goes with its process, however that ends
    process.join()
    assert fetch(server, tmp_path) == CONTENT


def test_full_disk_is_said_beforehand(tmp_path: Path) -> None:
    require_space(tmp_path, 1)
    with pytest.raises(DataError, match=r"(?s)about 1000000000.0 GB are needed.*--root"):
        require_space(tmp_path, 10**18)


def test_waits_grow(server: ThreadingHTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    server.behaviours = [answer(500)]
    with pytest.raises(DataError):
        download(remote(server), tmp_path, patience=Patience(5, 2.0, 60.0), report=lambda _: None)
    assert waits == [2, 4, 8, 16]

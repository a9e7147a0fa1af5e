"""The command `onestage demo`: a page on this machine that detects on images dropped into it."""

import io
import tempfile
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlsplit

from onestage.errors import ConfigError, ImageError, require

if TYPE_CHECKING:
    from onestage.deploy.predictor import Predictor

PAGE = Path(__file__).with_name("demo.html")
HOST = "127.0.0.1"  # other machines cannot reach it


def demo(*, ckpt_path: Path, port: int = 7860) -> int:
    """Detect on images that are dropped into a web page, with a slider for the score.

    Needs no network; other machines cannot reach the page. Ctrl-C ends it.

    Args:
        ckpt_path: a checkpoint, or the model.safetensors of `onestage export`.
        port: of the page, in [0, 65535]; 0: any free one.
    """
    from onestage.deploy.predictor import load  # seconds of imports

    with DemoServer(load(ckpt_path), port) as server:
        print(f"demo: http://{HOST}:{server.server_port} (Ctrl-C ends it)", flush=True)
        with suppress(KeyboardInterrupt):
            server.serve_forever()
    return 0


class DemoServer(ThreadingHTTPServer):
    """A server for this machine alone; ConfigError if the port cannot be used.

    GET / is the page; POST /detect?score=0.5 with the bytes of an image file returns it as a JPEG with the detections
    drawn, or status 400 with the reason.
    """

    def __init__(self, model: "Predictor", port: int) -> None:
        self.model, self.lock = model, threading.Lock()  # the model takes one image at a time
        try:
            super().__init__((HOST, port), DemoHandler)
        except (OSError, OverflowError) as error:
            raise ConfigError(f"demo: port {port} cannot be used: {error}.\nGive another --port, or 0.") from error

    def draw(self, content: bytes, score: float) -> bytes:
        """Return a JPEG of an image file with its detections."""
        from onestage.data.images import read_image
        from onestage.evaluation.drawing import JPEG_QUALITY

        drawn = io.BytesIO()
        with tempfile.TemporaryDirectory(prefix="onestage-") as folder, self.lock:
            file = Path(folder) / "image"
            file.write_bytes(content)
            image = read_image(file)
            self.model.predict(image, score=score).draw(image).save(drawn, "JPEG", quality=JPEG_QUALITY)
        return drawn.getvalue()


class DemoHandler(BaseHTTPRequestHandler):
    """The answer to one request."""

    server: DemoServer

    def parse_request(self) -> bool:
        """Refuse the name of another site that leads to this machine, so that no other page reaches this one."""
        if not super().parse_request():
            return False
        is_own = self.headers.get("Host", "").partition(":")[0] in (HOST, "localhost")
        if not is_own:
            self.send_error(400)
        return is_own

    def do_GET(self) -> None:  # a name of the standard library
        """Send the page."""
        page = PAGE.read_text(encoding="utf-8").replace("SCORE", f"{self.server.model.score_threshold:.2f}")
        self._reply(200, "text/html; charset=utf-8", page.encode()) if self.path == "/" else self.send_error(404)

    def do_POST(self) -> None:
        """Send the detections."""
        from onestage.data.images import MAX_IMAGE_BYTES

        try:
            score, length = float(parse_qs(urlsplit(self.path).query)["score"][0]), int(self.headers["Content-Length"])
            require(0 < length <= MAX_IMAGE_BYTES, "image: bytes", length, f"in [1, {MAX_IMAGE_BYTES}]")
            self._reply(200, "image/jpeg", self.server.draw(self.rfile.read(length), score))
        except (ImageError, ConfigError, KeyError, TypeError, ValueError) as error:
            self._reply(400, "text/plain; charset=utf-8", str(error).partition("\n")[0].encode())

    def _reply(self, status: int, content_type: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing."""

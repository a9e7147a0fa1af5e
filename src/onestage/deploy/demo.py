"""The command `onestage demo`: a page on this machine that detects on images dropped into it."""

import io
import tempfile
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

from onestage.errors import ConfigError, ImageError, require

if TYPE_CHECKING:
    from onestage.deploy.predictor import Predictor

PAGE = Path(__file__).with_name("demo.html")
HOST = "127.0.0.1"  # other machines cannot reach it


def demo(*, ckpt_path: Path, port: int = 7860) -> int:
    """Detect on images that are dropped into a web page, with a slider for the score.

    Needs no further package and no network; other machines cannot reach the page. Ctrl-C ends it.

    Args:
        ckpt_path: a checkpoint, or the model.safetensors of `onestage export`.
        port: of the page, in [0, 65535]; 0: any free one.
    """
    from onestage.deploy.predictor import load  # seconds of imports

    with make_server(load(ckpt_path), port) as server:
        print(f"demo: http://{HOST}:{server.server_port} (Ctrl-C ends it)", flush=True)
        with suppress(KeyboardInterrupt):
            server.serve_forever()
    return 0


def make_server(model: "Predictor", port: int) -> ThreadingHTTPServer:
    """Return the server of the page, which listens already; `serve_forever` answers.

    GET / is the page; POST /detect?score=0.5 with the bytes of an image file returns it as a JPEG with the detections
    drawn, or status 400 with the reason.

    Raises:
        ConfigError: the port cannot be used.
    """
    from onestage.data.images import MAX_IMAGE_BYTES, read_image
    from onestage.evaluation.drawing import JPEG_QUALITY

    page = PAGE.read_text(encoding="utf-8").replace("SCORE", f"{model.score_threshold:.2f}").encode()
    lock = threading.Lock()  # the model takes one image at a time

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            is_page = self.path == "/"
            self._reply(200 if is_page else 404, "text/html; charset=utf-8", page if is_page else b"")

        def do_POST(self) -> None:
            drawn = io.BytesIO()
            try:
                score, length = parse_qs(urlsplit(self.path).query)["score"][0], int(self.headers["Content-Length"])
                require(0 < length <= MAX_IMAGE_BYTES, "image: bytes", length, f"in [1, {MAX_IMAGE_BYTES}]")
                with tempfile.TemporaryDirectory(prefix="onestage-") as folder, lock:
                    file = Path(folder) / "image"
                    file.write_bytes(self.rfile.read(length))
                    image = read_image(file)
                    model.predict(image, score=float(score)).draw(image).save(drawn, "JPEG", quality=JPEG_QUALITY)
            except (ImageError, ConfigError, KeyError, TypeError, ValueError) as error:
                self._reply(400, "text/plain; charset=utf-8", str(error).partition("\n")[0].encode())
            else:
                self._reply(200, "image/jpeg", drawn.getvalue())

        def _reply(self, status: int, kind: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Print nothing."""

    try:
        return ThreadingHTTPServer((HOST, port), Handler)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"demo: port {port} cannot be used: {error}.\nGive another --port, or 0.") from error

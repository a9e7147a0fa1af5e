"""The command `onestage demo`: a page of this machine that detects on images dropped into it."""

import io
import tempfile
import threading
from collections import Counter
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, quote, urlsplit

from onestage.errors import ConfigError, ImageError, require

if TYPE_CHECKING:
    from onestage.deploy.predictor import Predictor

PAGE = Path(__file__).with_name("demo.html")
NAME = "image"  # of the file while it is decoded
HOST = "127.0.0.1"  # nobody else reaches it


def demo(*, ckpt_path: Path, port: int = 7860) -> int:
    """Detect on images that are dropped into a web page of this machine, with a slider for the score.

    Needs no package and no network; other machines cannot reach the page. Ctrl-C ends it.

    Args:
        ckpt_path: a checkpoint, or the model.safetensors of `onestage export`.
        port: of the page, in [0, 65535]; 0: any free one.
    """
    from onestage.deploy.predictor import load  # seconds of imports

    require(0 <= port <= 65535, "demo: port", port, "in [0, 65535]")
    with make_server(load(ckpt_path), port) as server:
        print(f"demo: http://{HOST}:{server.server_port} (Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("demo: ended")
    return 0


def make_server(model: "Predictor", port: int) -> ThreadingHTTPServer:
    """Return the server of the page, which listens already; `serve_forever` answers.

    GET / is the page; POST /detect?score=0.5 with the bytes of an image file returns it as a JPEG with the detections
    drawn, and in the header X-Found their number by class, percent-encoded.

    Raises:
        ConfigError: the port is in use.
    """
    from onestage.data.images import MAX_IMAGE_BYTES, read_image
    from onestage.evaluation.drawing import JPEG_QUALITY

    lock = threading.Lock()  # the model takes one image at a time
    page = PAGE.read_text(encoding="utf-8").replace("SCORE", f"{model.score_threshold:.2f}")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            is_page = urlsplit(self.path).path == "/"
            self._reply(HTTPStatus.OK if is_page else HTTPStatus.NOT_FOUND, "text/html", page if is_page else "")

        def do_POST(self) -> None:
            try:
                score = float(parse_qs(urlsplit(self.path).query)["score"][0])
                length = int(self.headers["Content-Length"])
                require(0 < length <= MAX_IMAGE_BYTES, "image: bytes", length, f"in [1, {MAX_IMAGE_BYTES}]")
                content = self.rfile.read(length)
                with tempfile.TemporaryDirectory(prefix="onestage-") as folder, lock:
                    file = Path(folder) / NAME
                    file.write_bytes(content)
                    image = read_image(file)
                    found = model.predict(image, score=score)
            except (ImageError, ConfigError, KeyError, TypeError, ValueError) as error:
                reason = str(error).partition("\n")[0].rpartition(f"/{NAME}: ")[2]  # without the temporary folder
                self._reply(HTTPStatus.BAD_REQUEST, "text/plain", reason)
                return
            drawn = io.BytesIO()
            found.draw(image).save(drawn, "JPEG", quality=JPEG_QUALITY)
            counts = ", ".join(f"{count} {name}" for name, count in Counter(found.names).items())
            self._reply(HTTPStatus.OK, "image/jpeg", drawn.getvalue(), counts or "nothing found")

        def _reply(self, status: HTTPStatus, kind: str, content: str | bytes, found: str = "") -> None:
            body = content.encode() if isinstance(content, str) else content
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8" if kind.startswith("text") else kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("X-Found", quote(found))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Print nothing."""

    try:
        return ThreadingHTTPServer((HOST, port), Handler)
    except OSError as error:
        raise ConfigError(f"demo: port {port} cannot be used: {error.strerror}.\nGive another --port, or 0.") from error

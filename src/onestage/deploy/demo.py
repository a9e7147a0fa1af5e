"""The command `onestage demo`: a page on this machine that detects on images dropped into it."""

import io
import socket
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from onestage.errors import ConfigError, ImageError, missing_package, require

if TYPE_CHECKING:
    from starlette.applications import Starlette

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
    try:
        import uvicorn
    except ModuleNotFoundError as error:
        raise missing_package("demo", "onestage[demo]") from error
    from onestage.deploy.predictor import load  # seconds of imports

    with open_port(port) as listener:
        server = uvicorn.Server(uvicorn.Config(make_app(load(ckpt_path)), log_level="warning", lifespan="off"))
        print(f"demo: http://{HOST}:{listener.getsockname()[1]} (Ctrl-C ends it)", flush=True)
        with suppress(KeyboardInterrupt):
            server.run(sockets=[listener])
    return 0


def open_port(port: int) -> socket.socket:
    """Return a socket that listens on a port of this machine alone; ConfigError if it cannot be used."""
    try:
        return socket.create_server((HOST, port))
    except (OSError, OverflowError) as error:
        raise ConfigError(f"demo: port {port} cannot be used: {error}.\nGive another --port, or 0.") from error


def make_app(model: "Predictor") -> "Starlette":
    """Return the web application.

    GET / is the page; POST /detect?score=0.5 with the bytes of an image file returns it as a JPEG with the detections
    drawn, or status 400 with the reason.
    """
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import Request
    from starlette.responses import HTMLResponse, PlainTextResponse, Response
    from starlette.routing import Route

    from onestage.data.images import MAX_IMAGE_BYTES, read_image
    from onestage.evaluation.drawing import JPEG_QUALITY

    page = PAGE.read_text(encoding="utf-8").replace("SCORE", f"{model.score_threshold:.2f}")
    lock = threading.Lock()  # the model takes one image at a time

    def draw(content: bytes, score: float) -> bytes:
        drawn = io.BytesIO()
        with tempfile.TemporaryDirectory(prefix="onestage-") as folder, lock:
            file = Path(folder) / "image"
            file.write_bytes(content)
            image = read_image(file)
            model.predict(image, score=score).draw(image).save(drawn, "JPEG", quality=JPEG_QUALITY)
        return drawn.getvalue()

    async def show(request: Request) -> Response:
        return HTMLResponse(page)

    async def detect(request: Request) -> Response:
        try:
            score, length = float(request.query_params["score"]), int(request.headers["Content-Length"])
            require(0 < length <= MAX_IMAGE_BYTES, "image: bytes", length, f"in [1, {MAX_IMAGE_BYTES}]")
            return Response(await run_in_threadpool(draw, await request.body(), score), media_type="image/jpeg")
        except (ImageError, ConfigError, KeyError, ValueError) as error:
            return PlainTextResponse(str(error).partition("\n")[0], status_code=400)

    # A page of another site must not reach it through a name that leads to this machine.
    own_names = Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])
    routes = [Route("/", show), Route("/detect", detect, methods=["POST"])]
    return Starlette(routes=routes, middleware=[own_names])

"""The page of `onestage demo` detects what `predict` detects."""

import io
import sys
import threading
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
import torch
from image_sets import smooth
from PIL import Image
from tiny_training import TinyDetector

from onestage.data import DetectionDataModule
from onestage.deploy.demo import demo, make_app, open_port
from onestage.deploy.predictor import Predictor
from onestage.errors import ConfigError
from onestage.evaluation.drawing import JPEG_QUALITY
from onestage.training.module import DetectionModule


@pytest.fixture(scope="module")
def model() -> Predictor:
    torch.manual_seed(0)
    data = DetectionDataModule(image_size=64, class_names=["apples", "pears"], category_ids=[1, 2])
    return Predictor(DetectionModule(TinyDetector(num_classes=2, prior=0.5)), data, torch.device("cpu"))


@pytest.fixture(scope="module")
def address(model):
    uvicorn = pytest.importorskip("uvicorn", reason="pip install 'onestage[demo]'")
    with open_port(0) as listener:
        server = uvicorn.Server(uvicorn.Config(make_app(model), log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        yield "http://{}:{}".format(*listener.getsockname())
        server.should_exit = True
        thread.join()


def test_image_comes_back_with_the_detections_of_predict_drawn(model, address) -> None:
    image, file = smooth(300, 400), io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    expected, drawn = model.predict(image, score=0.5), io.BytesIO()
    assert len(expected) > 0
    expected.draw(image).save(drawn, "JPEG", quality=JPEG_QUALITY)
    with urlopen(f"{address}/detect?score=0.5", data=file.getvalue()) as reply:
        assert reply.read() == drawn.getvalue()


def test_page_starts_with_the_score_of_the_model_and_only_this_machine_reaches_it(address) -> None:
    assert address.startswith("http://127.0.0.1:")
    with urlopen(f"{address}/") as reply:
        assert 'value="0.50"' in reply.read().decode()


@pytest.mark.parametrize(
    ("path", "data", "code", "message"),
    [
        ("detect?score=0.5", b"no image" * 99, 400, "is not an image"),
        ("detect?score=0.5", b"", 400, "must be in [1,"),
        ("../etc/passwd", None, 404, ""),
    ],
)
def test_bad_request_is_answered_with_its_reason(address, path, data, code, message) -> None:
    with pytest.raises(HTTPError) as answer:
        urlopen(f"{address}/{path}", data=data)
    assert answer.value.code == code
    assert message in answer.value.read().decode()


def test_name_of_another_site_is_refused(address) -> None:
    with pytest.raises(HTTPError) as answer:
        urlopen(Request(address, headers={"Host": "elsewhere.example"}))
    assert answer.value.code == 400


@pytest.mark.parametrize("port", [None, 70000])
def test_port_in_use_or_out_of_range_ends_with_one_message(port) -> None:
    message = r"port \d+ cannot be used: .*\nGive another --port"
    with open_port(0) as used, pytest.raises(ConfigError, match=message):
        open_port(port or used.getsockname()[1])


def test_missing_package_is_named_with_its_command(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ConfigError, match=r'pip install "onestage\[demo\]"'):
        demo(ckpt_path=Path("best.ckpt"))

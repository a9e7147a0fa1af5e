"""The architecture, checked on the syntax tree: who imports whom, how long things are, what is never called."""

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "onestage"
SOURCES = sorted(PACKAGE.rglob("*.py"))
SCRIPTS = sorted((ROOT / "scripts").rglob("*.py"))

# What each part may import of ours, beside `types`, `errors` and the version in the package itself. One way only.
ALLOWED_PARTS: dict[str, set[str]] = {
    "": set(),
    "types": set(),
    "errors": set(),
    "boxes": set(),
    "losses": set(),
    "models": {"boxes", "losses"},
    "data": set(),  # but see ALLOWED_MODULES
    "evaluation": {"boxes"},
    "training": {"evaluation"},
    "cli": {"training", "data"},
}
# `doctor` says what anchors can learn of a set. Loading never knows them: targets are matched on the device.
ALLOWED_MODULES: dict[str, set[str]] = {
    f"onestage.data.{name}": {"boxes"} for name in ("coverage", "anchor_proposal", "anchor_table")
}
IMPORTABLE_BY_ALL = {"", "types", "errors"}

# Libraries that a part must not know. A part that is not listed may import any.
FORBIDDEN_LIBRARIES: dict[str, set[str]] = {
    "": {"torch", "numpy", "lightning", "albumentations", "pycocotools", "torchmetrics"},
    "errors": {"torch", "numpy", "lightning"},
    "types": {"lightning", "torchvision", "albumentations", "pycocotools"},
    "boxes": {"lightning", "albumentations", "pycocotools", "cv2", "PIL", "pathlib"},
    "losses": {"lightning", "albumentations", "pycocotools", "cv2", "PIL", "pathlib"},
    "models": {"lightning", "albumentations", "pycocotools", "cv2", "PIL"},
    "evaluation": {"lightning", "albumentations"},
}

BANNED_WORDS = {"utils", "util", "misc", "common", "base", "helper", "helpers"}
MAX_FUNCTION_LINES = 40
MAX_FILE_LINES = 300
HEAVY = (
    "torch",
    "torchvision",
    "lightning",
    "albumentations",
    "pycocotools",
    "faster_coco_eval",
    "torchmetrics",
    "cv2",
    "matplotlib",
)


def module_of(path: Path) -> str:
    """Return the dotted name: src/onestage/boxes/__init__.py -> onestage.boxes.__init__."""
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)


def part_of(module: str) -> str:
    """Return the part that a dotted name of ours belongs to: "" for the package itself."""
    name = module.split(".")[1] if "." in module else ""
    return "" if name == "__init__" else name


def imported_modules(source: str, module: str) -> Iterator[tuple[int, str]]:
    """Yield line and absolute name of everything that is imported, wherever the import stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".")[: -node.level] if node.level else []
            origin = ".".join([*parents, *([node.module] if node.module else [])])
            yield node.lineno, origin
            if origin == "onestage":  # `from onestage import models`, or a name such as __version__
                yield from ((node.lineno, f"onestage.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and called_name(node).split(".")[-1] in ("import_module", "__import__"):
            yield from ((node.lineno, arg.value) for arg in node.args if is_text(arg))


def is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def called_name(call: ast.Call) -> str:
    """Return `torch.load` for torch.load(...), `.load` for anything()[0].load(...)."""
    names: list[str] = []
    node: ast.AST = call.func
    while isinstance(node, ast.Attribute):
        names.insert(0, node.attr)
        node = node.value
    names.insert(0, node.id if isinstance(node, ast.Name) else "")
    return ".".join(names)


def import_violations(source: str, module: str) -> list[str]:
    part = part_of(module)
    allowed = ALLOWED_PARTS[part] | ALLOWED_MODULES.get(module, set()) | IMPORTABLE_BY_ALL
    found = []
    for line, name in imported_modules(source, module):
        if name.split(".")[0] == "onestage":
            target = part_of(name)
            known = target in ALLOWED_PARTS  # else a name that the package itself defines
            if known and target != part and target not in allowed:
                found.append(f"{module}:{line}: {part or 'onestage'} may not import {target}")
        elif name.split(".")[0] in FORBIDDEN_LIBRARIES.get(part, set()):
            found.append(f"{module}:{line}: {part or 'onestage'} may not import {name}")
    return found


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> int:
    """Count the lines of a function without its docstring, comments and blank lines.

    A constructor's parameters are left out too: they are a table, one YAML key per line, and no code.
    """
    first = function.body[0]
    docstring = range(0)
    if isinstance(first, ast.Expr) and is_text(first.value):
        docstring = range(first.lineno, last_line(first) + 1)
    start = first.lineno if function.name == "__init__" else function.lineno
    numbers = range(start, last_line(function) + 1)
    texts = [lines[number - 1].strip() for number in numbers if number not in docstring]
    return sum(1 for text in texts if text and not text.startswith("#"))


def last_line(node: ast.stmt) -> int:
    return node.end_lineno or node.lineno


def size_violations(source: str, module: str) -> list[str]:
    lines = source.splitlines()
    found = [f"{module}: {len(lines)} lines"] if len(lines) > MAX_FILE_LINES else []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = code_lines(node, lines)
            if length > MAX_FUNCTION_LINES:
                found.append(f"{module}:{node.lineno}: {node.name} has {length} lines of code")
    return found


def words_of(name: str) -> set[str]:
    """Split snake_case and CamelCase into lower-case words: BoxLossBase -> box, loss, base."""
    return {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)}


def name_violations(source: str, module: str) -> list[str]:
    definitions = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    names = [node.name for node in ast.walk(ast.parse(source)) if isinstance(node, definitions)]
    return [
        f"{module}: {name} says {', '.join(sorted(words_of(name) & BANNED_WORDS))}"
        for name in [*module.split("."), *names]
        if words_of(name) & BANNED_WORDS
    ]


def keyword_is(call: ast.Call, name: str, value: object) -> bool:
    return any(
        keyword.arg == name and isinstance(keyword.value, ast.Constant) and keyword.value.value is value
        for keyword in call.keywords
    )


def unsafe_imports(source: str, module: str) -> Iterator[str]:
    """Find imports of what unpickles or parses XML without limits. Their exception and element types are harmless."""
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        origin = (node.module or "") if isinstance(node, ast.ImportFrom) else ""
        for name in names:
            full = f"{origin}.{name}".lstrip(".")
            library = full.split(".")[0]
            bad_pickle = library in ("dill", "cloudpickle", "joblib", "shelve", "marshal") or full.startswith("pickle.")
            bad_xml = library in ("xml", "lxml") and name not in ("Element", "ParseError")
            if (bad_pickle and name not in ("UnpicklingError", "PickleError")) or bad_xml or full == "torch.load":
                yield f"{module}:{node.lineno}: imports {full}"


def unsafe_calls(source: str, module: str) -> Iterator[str]:
    """Find calls that can run code which a file brings along."""
    tree = ast.parse(source)
    safe_loaders = {"yaml.SafeLoader", "yaml.CSafeLoader"}
    safe_loaders |= {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and safe_loaders & {ast.unparse(parent) for parent in node.bases}
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = called_name(node)
        loader = next((ast.unparse(keyword.value) for keyword in node.keywords if keyword.arg == "Loader"), "")
        rules = {
            "weights_only=False": keyword_is(node, "weights_only", False),
            "allow_pickle=True": keyword_is(node, "allow_pickle", True),
            "shell=True": keyword_is(node, "shell", True),
            "no weights_only=True": name == "torch.load" and not keyword_is(node, "weights_only", True),
            "a pickle": name in ("pickle.load", "pickle.loads", "pickle.Unpickler"),
            "a program": name in ("eval", "exec", "os.system"),
            "an unsafe loader": name in ("yaml.unsafe_load", "yaml.full_load")
            or (name == "yaml.load" and loader not in safe_loaders),
        }
        yield from (f"{module}:{node.lineno}: {name} with {rule}" for rule, broken in rules.items() if broken)


def unsafe_violations(source: str, module: str) -> list[str]:
    return [*unsafe_imports(source, module), *unsafe_calls(source, module)]


def test_every_part_of_the_package_has_a_row_in_the_import_table() -> None:
    assert {part_of(module_of(path)) for path in SOURCES} <= set(ALLOWED_PARTS)


@pytest.mark.parametrize("rule", [import_violations, size_violations, name_violations, unsafe_violations])
def test_the_package_breaks_no_rule(rule: Callable[[str, str], list[str]]) -> None:
    assert [line for path in SOURCES for line in rule(path.read_text(encoding="utf-8"), module_of(path))] == []


@pytest.mark.parametrize("rule", [size_violations, name_violations, unsafe_violations])
def test_the_scripts_break_no_rule(rule: Callable[[str, str], list[str]]) -> None:
    assert [line for path in SCRIPTS for line in rule(path.read_text(encoding="utf-8"), path.stem)] == []


def modules_that_call(function: str, source_by_module: dict[str, str]) -> set[str]:
    return {
        module
        for module, source in source_by_module.items()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and called_name(node) == function
    }


def test_checkpoints_and_published_weights_are_each_loaded_in_one_module() -> None:
    sources = {module_of(path): path.read_text(encoding="utf-8") for path in SOURCES}
    assert modules_that_call("torch.load", sources) <= {
        "onestage.reliability.checkpoint_files",
        "onestage.models.weights",
    }


def test_a_module_that_loads_a_checkpoint_is_found() -> None:
    sources = {"onestage.a": "torch.load(path, weights_only=True)", "onestage.b": "json.load(file)"}
    assert modules_that_call("torch.load", sources) == {"onestage.a"}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("onestage.boxes.anchors", "from onestage.models import SSD300"),
        ("onestage.boxes.anchors", "import onestage.models.ssd"),
        ("onestage.boxes.anchors", "from onestage import models"),
        ("onestage.boxes.anchors", "from ..models import ssd"),
        ("onestage.boxes.anchors", "from .. import models"),
        ("onestage.boxes.__init__", "from ..models.ssd import SSD300"),
        ("onestage.data.coco", "def parse():\n    from onestage.boxes import anchors"),
        ("onestage.data.coco", "if TYPE_CHECKING:\n    from onestage.training.module import DetectionModule"),
        ("onestage.training.module", "import importlib\nimportlib.import_module('onestage.models.ssd')"),
        ("onestage.training.module", "from onestage.data import COCODataModule"),
        ("onestage.evaluation.coco", "import lightning.pytorch as pl"),
        ("onestage.cli", "from onestage.models import SSD300"),
        ("onestage.types", "from onestage.boxes.anchors import make_anchors"),
        ("onestage.__init__", "import torch"),
        ("onestage.__init__", "from .training import module"),
    ],
)
def test_a_wrong_import_is_caught(module: str, source: str) -> None:
    assert len(import_violations(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("onestage.models.ssd", "from onestage.boxes.anchors import SSD300_VOC\nfrom onestage.types import Detector"),
        ("onestage.models.__init__", "from .ssd import SSD300"),
        ("onestage.evaluation.results", "from onestage import __version__"),
        ("onestage.training.module", "from ..evaluation import coco\nimport lightning"),
    ],
)
def test_a_right_import_passes(module: str, source: str) -> None:
    assert import_violations(source, module) == []


def test_a_function_of_41_lines_is_caught_and_its_docstring_and_comments_do_not_count() -> None:
    documented = ['    """One line.', "", '    And another."""', "    # a reason", ""]
    body = ["    x = 1"] * 39
    fits = "\n".join(["def f():", *documented, *body])
    assert size_violations(fits, "onestage.m") == []
    assert size_violations(fits + "\n    x = 2", "onestage.m") == ["onestage.m:1: f has 41 lines of code"]


def test_the_parameters_of_a_constructor_do_not_count() -> None:
    parameters = [f"    x{number}: int," for number in range(50)]
    assert size_violations("\n".join(["def __init__(", *parameters, "):", "    x = 1"]), "onestage.m") == []
    assert size_violations("\n".join(["def build(", *parameters, "):", "    x = 1"]), "onestage.m") != []


def test_a_file_of_301_lines_is_caught() -> None:
    assert size_violations("\n" * 300, "onestage.m") == []
    assert size_violations("\n" * 301, "onestage.m") == ["onestage.m: 301 lines"]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("onestage.data.utils", ""),
        ("onestage.boxes.box_helpers", ""),
        ("onestage.models.ssd", "class BaseDetector: ..."),
        ("onestage.models.ssd", "class A:\n    def misc_things(self): ..."),
    ],
)
def test_a_name_that_says_nothing_is_caught(module: str, source: str) -> None:
    assert len(name_violations(source, module)) == 1


def test_longer_words_that_hold_a_banned_one_pass() -> None:
    assert name_violations("class Backbone: ...\ndef rebase(): ...\ndef database(): ...", "onestage.models.vgg") == []


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "from torch import load",
        "load_state_dict_from_url(url, weights_only=False)",
        "pickle.load(file)",
        "pickle.loads(text)",
        "from pickle import loads",
        "from joblib import load",
        "np.load(path, allow_pickle=True)",
        "eval(text)",
        "os.system(line)",
        "yaml.load(text)",
        "yaml.load(text, Loader=yaml.Loader)",
        "class Any(yaml.UnsafeLoader): ...\nyaml.load(text, Loader=Any)",
        "subprocess.run(line, shell=True)",
        "import xml.etree.ElementTree as ElementTree",
        "from xml.etree import ElementTree",
        "from xml.etree.ElementTree import fromstring",
    ],
)
def test_what_can_run_foreign_code_is_caught(source: str) -> None:
    assert unsafe_violations(source, "onestage.m")


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path, weights_only=True)",
        "model.eval()",
        "yaml.safe_load(text)",
        "class Strict(yaml.SafeLoader): ...\nyaml.load(text, Loader=Strict)",
        "from xml.etree.ElementTree import Element, ParseError\nfrom defusedxml.ElementTree import fromstring",
        "import pickle\ntry: ...\nexcept pickle.UnpicklingError: ...",
    ],
)
def test_safe_loading_passes(source: str) -> None:
    assert unsafe_violations(source, "onestage.m") == []


def heavy_modules_after(statement: str, heavy: tuple[str, ...] = HEAVY) -> list[str]:
    """Return which of `heavy` a fresh interpreter holds after `statement`."""
    program = f"import sys\n{statement}\nprint(*(name for name in {heavy!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    return done.stdout.split()


def test_the_package_and_its_command_import_nothing_heavy() -> None:
    assert heavy_modules_after("import onestage, onestage.errors, onestage.cli") == []


def test_help_and_a_mistyped_command_import_nothing_heavy() -> None:
    run = "import contextlib, io, onestage.cli\nwith contextlib.redirect_stdout(io.StringIO()):\n"
    assert heavy_modules_after(run + "    onestage.cli.main(['--help']), onestage.cli.main(['fti'])") == []


@pytest.mark.parametrize("words", [["doctor", "--help"], ["anchors", "--help"], ["doctor", "data", "--fix_to"]])
def test_help_of_the_data_commands_and_their_mistakes_import_nothing_heavy(words: list[str]) -> None:
    run = "import contextlib, io, onestage.cli\nwith contextlib.redirect_stdout(io.StringIO()):\n"
    assert heavy_modules_after(run + f"    with contextlib.suppress(SystemExit): onestage.cli.main({words})") == []


def test_a_child_that_decodes_images_imports_the_decoder_alone() -> None:
    """With torch it would take twelve times as long to start, and three of its four gigabytes of address space."""
    assert heavy_modules_after("import onestage.doctor.decoder_child") == ["cv2"]


def test_an_import_that_is_listed_as_heavy_is_seen() -> None:
    assert heavy_modules_after("import decimal", heavy=("decimal", "torch")) == ["decimal"]

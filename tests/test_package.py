"""The dependency rule: cli → train, serve, evaluate → bundle, route, embed, data → types, config, errors."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "fedrouter"
FILES = sorted(PACKAGE.rglob("*.py"))

# A module may import from its own layer and from lower layers.
LAYERS = (
    {"types", "config", "config_file", "errors", "files", "layout", "plots"},
    {
        "builtin",
        "bundle",
        "conversation",
        "data",
        "decide",
        "embed",
        "embed_endpoint",
        "models",
        "partition",
        "probes",
        "route",
        "stacked",
    },
    {"train", "serve", "evaluate"},
    {"cli", "cli_federation", "experiment", "inspect", "push", "replay", "report", "__main__"},
)
LAYER_OF = {part: number for number, parts in enumerate(LAYERS) for part in parts}
APART = LAYERS[2]  # these never import each other, because the bundle on disk is their only interface
ROOMS = ("train.client", "train.server")  # two sides of a wire: neither imports the other

# The only packages in which a library may be imported.
HOMES = {
    "cryptography": (
        "bundle.sign",
        "train.wire",
        "train.client.summing",
        "train.server.summing",
        "train.flower",
    ),
    "flwr": "train.flower.sidecar",
    "dp_accounting": "train.server.accountant",
    "faiss": "route",
    "trl": "train.client.sft",
    "matplotlib": ("plots", "report", "experiment"),
    "vllm": "serve",
    "prometheus_client": "serve",  # comes with vLLM
}


def imported(source: str, module: str, is_package: bool = False) -> Iterator[str]:
    """Yield the full names of all imports in the source, also of those in functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = (
                module.split(".")[: len(module.split(".")) - node.level + is_package] if node.level else []
            )
            base = ".".join([*package, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def _inside(module: str, room: str) -> bool:
    return module == room or module.startswith(f"{room}.")


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """Return one module's violations of the rule; ``module`` is its dotted name under fedrouter."""
    part = module.split(".")[0]
    found = []
    for name in imported(source, f"fedrouter.{module}", is_package):
        top, _, rest = name.partition(".")
        homes = HOMES.get(top, ())
        homes = (homes,) if isinstance(homes, str) else homes
        if homes and not any(_inside(module, home) for home in homes):
            found.append(f"{module} imports {top}, whose place is {', '.join(homes)}")
        for here, there in (ROOMS, ROOMS[::-1]):
            if _inside(module, here) and top == "fedrouter" and _inside(rest, there):
                found.append(f"{module} imports {there}: two sides of a wire")
        other = rest.split(".")[0]
        if top != "fedrouter" or other not in LAYER_OF or other == part:
            continue
        if LAYER_OF[other] > LAYER_OF[part]:
            found.append(f"{module} imports {other} from a layer above")
        elif {part, other} <= APART:
            found.append(f"{module} imports {other}: both stand apart")
    return sorted(set(found))


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_every_part_has_a_layer() -> None:
    parts = {module_name(path).split(".")[0] for path in FILES} - {""}
    assert parts <= set(LAYER_OF), "name the layer of the new part in LAYERS"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_dependency_rule(path: Path) -> None:
    module = module_name(path)
    source = path.read_text(encoding="utf-8")
    if not module:  # fedrouter/__init__.py, which everything imports, must not import anything
        assert list(imported(source, "fedrouter", is_package=True)) == []
    else:
        assert violations(source, module, path.name == "__init__.py") == []


@pytest.mark.parametrize(
    ("module", "source", "found"),
    [
        ("types", "from fedrouter.data import load_records", ["types imports data from a layer above"]),
        ("route", "from fedrouter import train", ["route imports train from a layer above"]),
        ("train.run", "from fedrouter.serve import launch", ["train.run imports serve: both stand apart"]),
        (
            "serve.launch",
            "def f():\n    import fedrouter.train",
            ["serve.launch imports train: both stand apart"],
        ),
        ("evaluate.run", "from ..cli import main", ["evaluate.run imports cli from a layer above"]),
        ("embed", "import faiss.contrib", ["embed imports faiss, whose place is route"]),
        (
            "train.client.sft",
            "from fedrouter.train.server.aggregate import mean",
            ["train.client.sft imports train.server: two sides of a wire"],
        ),
        (
            "train.server.loop",
            "from fedrouter.train import client",
            ["train.server.loop imports train.client: two sides of a wire"],
        ),
        ("train.run", "from fedrouter.train.client import sft\nfrom fedrouter.train.server import loop", []),
        (
            "train.server.loop",
            "from trl import SFTTrainer",
            ["train.server.loop imports trl, whose place is train.client.sft"],
        ),
        ("train.run", "import faiss", ["train.run imports faiss, whose place is route"]),
        ("bundle", "from vllm.lora import x", ["bundle imports vllm, whose place is serve"]),
        (
            "push",
            "from cryptography import x",
            [
                "push imports cryptography, whose place is bundle.sign, train.wire, train.client.summing, "
                "train.server.summing, train.flower"
            ],
        ),
        ("cli", "import fedrouter.train\nfrom fedrouter import serve", []),
        (
            "serve.launch",
            "import vllm\nfrom fedrouter.bundle import load_bundle\nfrom . import middleware",
            [],
        ),
        (
            "train.client.sft",
            "import trl\nfrom fedrouter.models import load_base\nfrom .rows import Tokeniser",
            [],
        ),
    ],
)
def test_the_rule_is_seen_to_break(module: str, source: str, found: list[str]) -> None:
    assert violations(source, module) == found


def test_help_imports_no_heavy_library() -> None:
    run = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "fedrouter", "--help"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == 0, run.stderr.splitlines()[-5:]
    assert "serve" in run.stdout
    loaded = {
        line.rpartition("|")[2].strip().split(".")[0] for line in run.stderr.splitlines() if "|" in line
    }
    assert "fedrouter" in loaded
    heavy = {
        "datasets",
        "faiss",
        "flwr",
        "matplotlib",
        "openai",
        "pandas",
        "peft",
        "scipy",
        "sklearn",
        "torch",
        "transformers",
        "trl",
        "vllm",
    }
    assert loaded & heavy == set()

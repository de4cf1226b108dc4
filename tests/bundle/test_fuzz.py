"""Mutated bundles by hypothesis: each is refused in one line, or routes as the original does.

``FUZZ_EXAMPLES=100000 pytest tests/bundle/test_fuzz.py`` (``make fuzz``) tries more, other ones each time.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tamper
from fakes import space
from fakes import write as write_bundle
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from fedrouter.builtin import base_path
from fedrouter.builtin.tasks import TASKS, generate
from fedrouter.bundle import Bundle, check_base, check_embedder, load_bundle
from fedrouter.embed import PROBE_TEXTS, embedder_spec, load_embedder
from fedrouter.errors import FedRouterError
from fedrouter.models import base_spec
from fedrouter.route import BASE_NAME, REJECT, Router
from fedrouter.types import Array, Decision

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "1000"))
BASE = base_path("builtin:tiny")
RADII = [30.0, 25.0, 40.0]
HIDDEN = 192

# Replacements for any value in JSON.
VALUES = st.one_of(
    st.sampled_from(
        [None, True, False, 0, 1, -1, 99, 1 << 70, 1e38, -0.5, float("nan"), float("inf"), "", "12", [], {}]
    ),
    st.sampled_from(
        ["base", "reject", "nearest", "generalist", "float16", "encoder", "[red]x[/red]", "a\nb", "\0"]
    ),
    st.sampled_from(["../elsewhere", "/etc/passwd", "..", "adapters/../../elsewhere", "~/x", "x" * 5000]),
    st.integers(-(1 << 80), 1 << 80),
    st.floats(),
    st.text(max_size=20),
    st.lists(st.integers(-1, 9), max_size=3),
)
PATHS = ["manifest.json", "router.safetensors", "chat_template.jinja", "adapters", "adapters/*"]
PATHS += [f"adapters/*/{name}" for name in (tamper.CONFIG, tamper.WEIGHTS)]


class KnownEmbedder:
    """The built-in base's embedder, with the vectors of a few texts cached."""

    def __init__(self, texts: list[str]):
        base = base_spec("builtin:tiny", None, BASE)
        self.spec = embedder_spec("base", base.model, 128, "float32")
        self._known = dict(zip(texts, load_embedder(self.spec, base).embed(texts), strict=True))

    def embed(self, texts: Any) -> Array:
        return np.stack([self._known[text] for text in texts])


@cache
def prompts() -> tuple[KnownEmbedder, Array]:
    texts = [record.turns[-1].content for task in TASKS for record in generate(task, "test", 6, seed=1)]
    embedder = KnownEmbedder([*texts, *PROBE_TEXTS])
    return embedder, embedder.embed(texts)


def lora(seed: int) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    name = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    return {
        name.format(layer, factor): rng.normal(size=shape).astype(np.float32)
        for layer in (0, 1)
        for factor, shape in (("A", (2, HIDDEN)), ("B", (HIDDEN, 2)))
    }


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A small bundle for the built-in base, with a generalist and a chat template."""
    embedder, vectors = prompts()
    centroids = np.stack([vectors[k * 6 : k * 6 + 6].mean(axis=0) for k in range(3)])
    return write_bundle(
        tmp_path_factory.mktemp("fuzz") / "original",
        space(centroids),
        RADII,
        base=base_spec("builtin:tiny", None, BASE),
        embedder=embedder.spec,
        adapters=[lora(k) for k in range(3)],
        generalist=lora(9),
        probe_vectors=embedder.embed(PROBE_TEXTS),
        chat_template="{{ messages }}",
    )


def use(path: Path) -> tuple[list[Decision], dict[str, bytes]]:
    """Do everything that serving does; return the decisions, and the files that vLLM would read."""
    embedder, vectors = prompts()
    bundle = load_bundle(path)
    check_base(bundle, BASE)
    check_embedder(bundle, embedder)
    return Router(bundle).route(vectors), {name: (path / name).read_bytes() for name in bundle.files}


# Python's audit hooks cannot be removed, so the process has one with a variable list of directories.
_watched: list[list[str]] = []


def _hear(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _watched and isinstance(arguments[0], str | bytes):
        _watched[-1].append(os.fsdecode(arguments[0]))


sys.addaudithook(_hear)


@contextmanager
def only_reading(*allowed: Path) -> Iterator[None]:
    """Fail if a file is opened that, with links resolved, is in none of these directories."""
    _watched.append([])
    try:
        yield
    finally:
        opened = _watched.pop()
        outside = {
            f for f in opened if not any(Path(f).resolve().is_relative_to(a.resolve()) for a in allowed)
        }
        outside = {file for file in outside if not file.endswith((".py", ".pyc", ".so"))}  # opened by imports
        assert not outside, f"read outside of the bundle: {outside}"


def nodes(value: Any, where: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value in a JSON value."""
    yield where
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from nodes(inner, (*where, key))


def change_json(draw: Callable[[Any], Any], value: Any) -> Any:
    """Change one place of a JSON value: set, drop, rename, add, repeat or swap."""
    where = draw(st.sampled_from(sorted(nodes(value), key=repr)))
    if not where:
        return draw(VALUES)
    place = value
    for key in where[:-1]:
        place = place[key]
    how = draw(st.sampled_from(["set", "drop", "again", "swap", "rename"]))
    if how == "drop":
        del place[where[-1]]
    elif how == "again" and isinstance(place, list):
        place.append(place[where[-1]])
    elif how == "swap":
        other = draw(
            st.sampled_from(sorted(place, key=repr) if isinstance(place, dict) else range(len(place)))
        )
        place[where[-1]], place[other] = place[other], place[where[-1]]
    elif how == "rename" and isinstance(place, dict):
        place[draw(st.text(max_size=9))] = place.pop(where[-1])
    else:
        place[where[-1]] = draw(VALUES)
    return value


def change_bytes(draw: Callable[[Any], Any], content: bytes) -> bytes:
    """Change bytes, mostly near the beginning: flip, cut, insert, double."""
    at = draw(st.integers(0, min(len(content), draw(st.sampled_from([16, 400, 1 << 20])))))
    how = draw(st.sampled_from(["flip", "cut", "insert", "double", "deep"]))
    if how == "flip":
        new: bytes = draw(st.binary(min_size=1, max_size=4))
        return content[:at] + new + content[at + 1 :]
    if how == "cut":
        return content[:at]
    if how == "deep":
        return content[:at] + b"[" * 20_000 + content[at:]
    return content[:at] + (draw(st.binary(max_size=9)) if how == "insert" else content[:at]) + content[at:]


def change_header(draw: Callable[[Any], Any], content: bytes) -> bytes:
    """Change a place in a safetensors file's header."""
    length = int.from_bytes(content[:8], "little")
    header = json.dumps(change_json(draw, json.loads(content[8 : 8 + length]))).encode()
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


def change_values(draw: Callable[[Any], Any], content: bytes) -> bytes:
    """Set a few values of a safetensors file, to anything that a float32 can be."""
    begin = 8 + int.from_bytes(content[:8], "little")
    values = np.frombuffer(content[begin:], "<f4").copy()
    at = draw(st.integers(0, len(values) - 1))
    values[at : at + draw(st.sampled_from([1, 9, 1 << 20]))] = draw(st.floats(width=32))
    return content[:begin] + values.tobytes()


def change_path(draw: Callable[[Any], Any], root: Path) -> None:
    """Replace a file or directory with something else."""
    file = draw(st.sampled_from(sorted(root.glob(draw(st.sampled_from(PATHS))))))
    how = draw(
        st.sampled_from(["remove", "out", "in", "device", "fifo", "directory", "loop", "absolute", "large"])
    )
    if how == "large" and file.is_file():
        os.truncate(file, 1 << 41)
        return
    kept = root.parent / "elsewhere" / file.name
    if how in ("out", "absolute"):
        (shutil.copytree if file.is_dir() else shutil.copy)(file, kept)
    elif how == "in":
        kept = root / "inside"
        (shutil.copytree if file.is_dir() else shutil.copy)(file, kept)
    shutil.rmtree(file) if file.is_dir() else file.unlink()
    if how in ("out", "in", "absolute"):
        file.symlink_to(kept if how == "absolute" else os.path.relpath(kept, file.parent))
    elif how == "device":
        file.symlink_to("/dev/zero")
    elif how == "fifo":
        os.mkfifo(file)
    elif how == "directory":
        file.mkdir()
    elif how == "loop":
        file.symlink_to(file.name)


def mutate(draw: Callable[[Any], Any], root: Path) -> bool:
    """Change something in a bundle; return whether hashes, names and checksum were recomputed."""
    what = draw(st.sampled_from(["manifest", "config", "router", "weights", "path", "bytes"]))
    sealed: bool = draw(st.booleans())
    adapters = sorted((root / "adapters").iterdir())
    if what == "manifest":
        manifest = change_json(draw, tamper.read(root))
        if isinstance(manifest, dict) and sealed:
            tamper.write(root, manifest)
        else:
            (root / "manifest.json").write_text(json.dumps(manifest))
        return sealed
    if what == "path":
        change_path(draw, root)
        return False
    if what == "config":
        file = draw(st.sampled_from(adapters)) / tamper.CONFIG
        tamper.rewrite(file, lambda held: change_json(draw, held))
    elif what == "bytes":
        file = draw(st.sampled_from(sorted(path for path in root.rglob("*.*") if path.is_file())))
        file.write_bytes(change_bytes(draw, file.read_bytes()))
        sealed = sealed and file.name != "manifest.json"
    else:
        file = (
            root / "router.safetensors"
            if what == "router"
            else draw(st.sampled_from(adapters)) / tamper.WEIGHTS
        )
        change = draw(st.sampled_from([change_header, change_values]))
        file.write_bytes(change(draw, file.read_bytes()))
    if sealed:
        tamper.reseal(root)
    return sealed


@pytest.fixture(scope="module")
def expected(original: Bundle) -> tuple[list[Decision], dict[str, bytes]]:
    return use(original.path)


@pytest.mark.timeout(0)
@settings(
    max_examples=EXAMPLES,
    derandomize=EXAMPLES == 1000,
    database=None,
    suppress_health_check=[
        HealthCheck.function_scoped_fixture,
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
    ],
)
@given(data=st.data())
def test_a_mutated_bundle_is_refused_in_one_line_or_routes_as_before(
    original: Bundle, expected: tuple[list[Decision], dict[str, bytes]], tmp_path: Path, data: st.DataObject
) -> None:
    root = tmp_path / "bundle"
    for directory in (root, tmp_path / "elsewhere"):
        shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(original.path, root)
    (tmp_path / "elsewhere").mkdir()
    sealed = mutate(data.draw, root)
    try:
        with only_reading(root, BASE):
            found = use(root)
    except FedRouterError as error:
        line = str(error)
        assert line.isprintable()
        assert len(line) < 1000
        event("refused")
        return
    event(f"accepted, {'made anew' if sealed else 'as it was'}")
    if not sealed:
        assert found == expected
    else:  # a valid bundle with other content: its decisions must be usable
        served = {BASE_NAME, REJECT, *load_bundle(root).adapter_paths}
        assert all(decision.model in served for decision in found[0])
        assert all(np.isfinite(decision.distance) for decision in found[0])

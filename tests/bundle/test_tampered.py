"""Kinds of tampered bundles: ``load_bundle`` refuses each in one line that names the place."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tamper
import torch
from fakes import MODULE, adapter, space
from fakes import write as write_bundle
from safetensors.numpy import load_file, save, save_file
from safetensors.torch import save_file as save_torch
from tamper import CONFIG, WEIGHTS, edit, first_adapter, reseal, rewrite, safetensors

from fedrouter.bundle import Bundle, load_bundle
from fedrouter.errors import BundleError
from fedrouter.route import Router
from fedrouter.types import RoutingSpace

A, B = f"{MODULE}.lora_A.weight", f"{MODULE}.lora_B.weight"
DEEP = "[" * 100_000
HUGE = 3 << 30

# Invalid values by the path of the field in the manifest.
FIRST = ("clusters", 0)
TEXTS: tuple[Any, ...] = (None, 7, True, "", "a\nb", "\x1b[31m", "a\u202eb", ["a"], {})
NUMBERS: tuple[Any, ...] = (None, "12", True, -1, float("nan"), float("inf"), [1], {})
COUNTS = (*NUMBERS, 1.5, 1 << 60)
BAD: dict[tuple[str | int, ...], tuple[Any, ...]] = {
    ("schema_version",): (True, "2", 2.0, None, 3, 0),
    ("base",): (None, [], "x", {}),
    ("base", "model"): (*TEXTS, "x" * 5000),
    ("base", "revision"): TEXTS[1:],
    ("base", "fingerprint"): TEXTS,
    ("base", "more"): (1,),
    ("embedder",): (None, [], {}),
    ("embedder", "kind"): (*TEXTS, "guess"),
    ("embedder", "model"): TEXTS,
    ("embedder", "fingerprint"): TEXTS,
    ("embedder", "layer"): COUNTS,
    ("embedder", "max_tokens"): (*COUNTS, 0),
    ("embedder", "dtype"): (*TEXTS, "int8", "Module"),
    ("embedder", "pooling"): (*TEXTS, "max"),
    ("embedder", "dim"): (*COUNTS, 0, 1 << 40),
    ("embedder", "more"): (1,),
    ("rank",): (*COUNTS, 0),
    ("fallback",): (*TEXTS, "guess", "generalist"),
    ("generalist",): (7, True, [], "task-0", "../../x-00000000", "generalist-00000000"),
    ("files",): (None, [], {}),
    ("files", "router.safetensors"): (*TEXTS, "0" * 63),
    ("files", "/etc/passwd"): ("0" * 64,),
    ("files", "../x"): ("0" * 64,),
    ("clusters",): (None, {}, [], "x", [None]),
    (*FIRST, "name"): (*TEXTS, "[red]x[/red]", "a/b", "..", "generalist", "task-1", "x" * 65, "task-9"),
    (*FIRST, "adapter"): (*TEXTS, "../elsewhere/x-00000000", "/etc/x-00000000", "task-0", "task-0-00000000"),
    (*FIRST, "num_examples"): COUNTS,
    (*FIRST, "clients"): (None, "client-0", [7], [None], ["a\nb"], ["a", "a"], {}, ["x" * 201]),
    (*FIRST, "task_counts"): (None, [], {"a": "3"}, {"a": True}, {"a\nb": 3}, {"a": -1}),
    (*FIRST, "radius"): NUMBERS,
    (*FIRST, "training"): (None, [], {"loss": "1"}, {"loss": float("nan")}),
    (*FIRST, "more"): (1,),
    ("versions",): (None, [], {"a": 1}, {"a\n": "1"}),
    ("privacy",): (None, {}, [{}], [{"unit": "row"}]),
    ("more",): (1,),
}


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    written = write_bundle(
        tmp_path / "bundle", space(np.eye(8)[:2]), [0.5, 0.5], chat_template="{{ messages }}"
    )
    (tmp_path / "elsewhere").mkdir()
    return written


def refused(path: Path) -> str:
    """Return the error message for a bundle."""
    with pytest.raises(BundleError) as caught:
        load_bundle(path)
    line = str(caught.value)
    assert line.isprintable(), "one line, without control characters"
    assert line.startswith(str(path))
    assert len(line) < 600
    return line


@pytest.mark.parametrize("where", BAD, ids=lambda where: ".".join(map(str, where)))
def test_values_of_the_manifest_that_must_not_be(bundle: Bundle, where: tuple[str | int, ...]) -> None:
    good = (bundle.path / "manifest.json").read_bytes()
    for value in BAD[where]:
        (bundle.path / "manifest.json").write_bytes(good)
        edit(bundle.path, *where, to=value)
        assert "manifest.json" in refused(bundle.path), value


def test_no_value_of_the_manifest_goes_unchecked(bundle: Bundle) -> None:
    """Every key, also of nested objects, is in the table above."""
    manifest = tamper.read(bundle.path)
    keys: set[tuple[str | int, ...]] = {(key,) for key in manifest if key != "checksum"}
    for section in ("base", "embedder"):
        keys |= {(section, key) for key in manifest[section]}
    keys |= {(*FIRST, key) for key in manifest["clusters"][0]}
    assert keys <= BAD.keys()


RAW: dict[str, tuple[str | bytes, str]] = {
    "deep": (DEEP, "recursion limit"),
    "deep and closed": (DEEP + "]" * len(DEEP), "recursion limit"),
    "deep inside": ('{"a":' * 100_000 + "1" + "}" * 100_000, "recursion limit"),
    "a list": ("[]", "schema version None"),
    "a number": ("7", "schema version None"),
    "nothing": ("", "not readable as JSON"),
    "no UTF-8": (b'{"a": "\xff"}', "not readable as JSON"),
    "a constant": ('{"schema_version": NaN}', "not readable as JSON"),
    "of before": ('{"schema_version": 1}', "schema version 1.*train again"),
    "of later": ('{"schema_version": 99}', "schema version 99 is unknown"),
    "a strange version": ('{"schema_version": "a\\nb"}', "schema version"),
}


@pytest.mark.parametrize("kind", RAW)
def test_a_manifest_that_is_none(bundle: Bundle, kind: str) -> None:
    text, says = RAW[kind]
    (bundle.path / "manifest.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(bundle.path)
    with pytest.raises(BundleError, match=says):
        load_bundle(bundle.path)


def test_a_change_by_accident_shows_in_the_checksum(bundle: Bundle) -> None:
    manifest = tamper.read(bundle.path)
    manifest["clusters"][0]["radius"] = 0.75
    tamper.write(bundle.path, manifest, seal=False)
    assert "differs from its checksum" in refused(bundle.path)
    tamper.write(bundle.path, manifest)
    assert load_bundle(bundle.path).clusters[0].radius == 0.75


def config(**changes: Any) -> Callable[[Path], None]:
    return lambda root: rewrite(first_adapter(root) / CONFIG, lambda held: {**held, **changes})


def without(key: str) -> Callable[[Path], None]:
    return lambda root: rewrite(
        first_adapter(root) / CONFIG, lambda held: {k: v for k, v in held.items() if k != key}
    )


def raw(name: str, content: bytes) -> Callable[[Path], None]:
    def apply(root: Path) -> None:
        (first_adapter(root) / name).write_bytes(content)

    return apply


def weights(change: Callable[[dict[str, np.ndarray]], Mapping[str, np.ndarray]]) -> Callable[[Path], None]:
    def apply(root: Path) -> None:
        file = first_adapter(root) / WEIGHTS
        save_file({name: np.ascontiguousarray(a) for name, a in change(load_file(file)).items()}, file)

    return apply


def router(change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> Callable[[Path], None]:
    def apply(root: Path) -> None:
        held = load_file(root / "router.safetensors")
        (root / "router.safetensors").write_bytes(
            save({k: np.ascontiguousarray(v) for k, v in change(held).items()})
        )

    return apply


def header(**entry: Any) -> Callable[[Path], None]:
    """Write a file with one tensor and a changed header entry."""
    text = json.dumps({"x": {"dtype": "F32", "shape": [2, 6], "data_offsets": [0, 48]} | entry}).encode()
    return raw(WEIGHTS, len(text).to_bytes(8, "little") + text + bytes(48))


def full(value: float) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    return lambda t: {**t, A: np.full_like(t[A], value)}


FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    # adapter_config.json
    **{
        f"config: {key} = {ascii(value)[:30]}": (config(**{key: value}), f"not plain LoRA.*{key}")
        for key, values in {
            "peft_type": ("LOHA", None, 7),
            "r": ("2", True, 0, -1, None, 2.5, 1 << 40),
            "lora_alpha": ("4", True, 0, -4, None, 1e9),
            "target_modules": (None, 7, [7], {}),
            "bias": ("all", "lora_only", None, True),
            "use_dora": (True, 1, "false"),
            "use_rslora": (1, "true", None),
            "lora_bias": (True,),
            "use_qalora": (True,),
            "modules_to_save": (["lm_head"], "lm_head"),
            "trainable_token_indices": ([1], {"embed_tokens": [1]}),
            "target_parameters": (["x"],),
            "layer_replication": ([[0, 1]],),
            "alora_invocation_tokens": ([1],),
            "rank_pattern": ({"q_proj": 1},),
            "alpha_pattern": ({"q_proj": 1},),
            "use_bdlora": ({"nblocks": 2},),
            "init_lora_weights": ("pissa", "olora", "loftq", [1]),
            "task_type": ("SEQ_CLS", 7),
            "kasa_config": ({"beta": 1},),
            "arrow_config": ({"top_k": 1},),
        }.items()
        for value in values
    },
    "config: alpha is no number": (config(lora_alpha=float("inf")), "not plain LoRA"),
    "config: a strange key": (config(**{"a\nb": True}), "not plain LoRA"),
    **{
        f"config: no {key}": (without(key), key) for key in ("r", "lora_alpha", "peft_type", "target_modules")
    },
    "config: deep": (raw(CONFIG, DEEP.encode()), "not plain LoRA"),
    "config: a list": (raw(CONFIG, b"[]"), "not plain LoRA"),
    "config: of another rank": (config(r=4), "not a LoRA factor of rank 4"),
    "config: of other modules": (config(target_modules=["k_proj"]), "not of a module in target_modules"),
    # adapter_model.safetensors
    "weights: empty": (raw(WEIGHTS, b""), "no safetensors header"),
    "weights: a long header": (raw(WEIGHTS, (1 << 62).to_bytes(8, "little")), "no safetensors header"),
    "weights: a pickle": (raw(WEIGHTS, b"\x80\x04\x95" + bytes(40)), "damaged"),
    "weights: header deep": (
        raw(WEIGHTS, (100_000).to_bytes(8, "little") + DEEP.encode()),
        "damaged: header",
    ),
    "weights: header a list": (raw(WEIGHTS, (2).to_bytes(8, "little") + b"[]"), "damaged: header"),
    "weights: no tensors": (raw(WEIGHTS, (2).to_bytes(8, "little") + b"{}"), "contains no tensors"),
    "weights: cut off": (lambda p: os.truncate(first_adapter(p) / WEIGHTS, 200), "damaged"),
    "weights: bytes behind": (header(shape=[1, 6], data_offsets=[0, 24]), "describes 24"),
    "weights: a hole": (header(shape=[1, 6], data_offsets=[24, 48]), "starts at 24"),
    "weights: offsets that lie": (header(data_offsets=[0, 44]), "starts at 0"),
    "weights: negative offsets": (header(data_offsets=[-48, 0]), "damaged: header"),
    "weights: a negative shape": (header(shape=[-2, -6]), "damaged: header"),
    "weights: an enormous shape": (header(shape=[1 << 31, 1 << 31]), "damaged: tensor"),
    "weights: a shape of strings": (header(shape=["2", "6"]), "damaged: header"),
    "weights: three axes": (header(shape=[1, 2, 6]), "damaged: header"),
    "weights: no axes": (header(shape=[], data_offsets=[0, 4]), "damaged: header"),
    "weights: a dtype unknown": (header(dtype="F7"), "damaged: header"),
    "weights: more in the header": (header(more=1), "damaged: header"),
    "weights: no LoRA name": (header(), "not named like a LoRA factor"),
    "weights: int8": (
        raw(WEIGHTS, safetensors({A: ("I8", [2, 6], bytes(12)), B: ("I8", [6, 2], bytes(12))})),
        "damaged: header",
    ),
    "weights: float64": (
        weights(lambda t: {k: v.astype(np.float64) for k, v in t.items()}),
        "damaged: header",
    ),
    "weights: int64": (weights(lambda t: {k: v.astype(np.int64) for k, v in t.items()}), "is I64"),
    "weights: NaN": (weights(full(np.nan)), "not finite"),
    "weights: infinite": (weights(full(-np.inf)), "not finite"),
    "weights: float16 that is infinite": (
        weights(lambda t: {k: np.full(v.shape, np.inf, np.float16) for k, v in t.items()}),
        "not finite",
    ),
    "weights: bfloat16 that is infinite": (
        raw(WEIGHTS, safetensors({A: ("BF16", [2, 6], b"\x80\x7f" * 12), B: ("BF16", [6, 2], bytes(24))})),
        "not finite",
    ),
    "weights: one factor": (weights(lambda t: {A: t[A]}), "no counterpart"),
    "weights: another prefix": (
        weights(lambda t: {k.replace("base_model.", ""): v for k, v in t.items()}),
        "not named like a LoRA factor",
    ),
    "weights: a strange name": (weights(lambda t: {**t, "a\nb": t[A]}), "not named like a LoRA factor"),
    "weights: a full module": (
        weights(lambda t: {**t, f"{MODULE}.weight": t[A]}),
        "not named like a LoRA factor",
    ),
    "weights: transposed": (weights(lambda t: {k: v.T for k, v in t.items()}), "not a LoRA factor of rank 2"),
    "weights: another width": (weights(lambda t: adapter(0, width=7)), "differ in name or shape"),
    "weights: another module": (
        weights(lambda t: {k.replace("layers.0", "layers.1"): v for k, v in t.items()}),
        "differ in name or shape",
    ),
    "another rank": (
        lambda p: (config(r=3)(p), weights(lambda t: adapter(0, rank=3))(p)),
        "rank 3, but the manifest says 2",
    ),
    # router.safetensors
    "router: no mean": (router(lambda t: {k: v for k, v in t.items() if k != "mean"}), "do not fit"),
    "router: one more": (router(lambda t: {**t, "more": t["mean"]}), "do not fit"),
    "router: float64": (router(lambda t: {**t, "mean": t["mean"].astype(np.float64)}), "damaged: header"),
    "router: float16": (router(lambda t: {**t, "mean": t["mean"].astype(np.float16)}), "do not fit"),
    "router: int32": (
        router(lambda t: {**t, "cluster_of": t["cluster_of"].astype(np.int32)}),
        "damaged: header",
    ),
    "router: another dimension": (router(lambda t: {**t, "mean": t["mean"][:7]}), "do not fit"),
    "router: a wide space": (
        router(
            lambda t: {
                **t,
                "transform": np.ones((8, 9), np.float32),
                "centroids": np.ones((2, 9), np.float32),
            }
        ),
        "do not fit",
    ),
    "router: fewer probes": (router(lambda t: {**t, "probe": t["probe"][:2]}), "do not fit"),
    "router: no probe": (router(lambda t: {**t, "probe": 0 * t["probe"]}), "probe is zero"),
    "router: probe too small to square": (
        router(lambda t: {**t, "probe": np.full_like(t["probe"], 3.4e-31)}),
        "probe is zero",
    ),
    "router: one centroid too few": (router(lambda t: {**t, "centroids": t["centroids"][:1]}), "do not fit"),
    "router: a task cluster without": (
        router(lambda t: {**t, "cluster_of": np.zeros(2, np.int64)}),
        "does not number",
    ),
    "router: a task cluster beyond": (
        router(lambda t: {**t, "cluster_of": np.array([0, 2])}),
        "does not number",
    ),
    "router: a negative one": (router(lambda t: {**t, "cluster_of": np.array([0, -1])}), "does not number"),
    **{
        f"router: {name} {value}": (
            router(lambda t, name=name, value=value: {**t, name: np.full_like(t[name], value)}),  # type: ignore[misc]
            "not finite" if not np.isfinite(value) else "values above",
        )
        for name in ("mean", "transform", "centroids", "probe")
        for value in (np.nan, np.inf, 1e38)
    },
    "template: no UTF-8": (lambda p: (p / "chat_template.jinja").write_bytes(b"\xff"), "not UTF-8"),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_file_that_must_not_be(bundle: Bundle, kind: str) -> None:
    spoil, says = FILES[kind]
    spoil(bundle.path)
    with pytest.raises(BundleError, match="content differs"):
        load_bundle(bundle.path)
    reseal(bundle.path)
    refused(bundle.path)
    with pytest.raises(BundleError, match=says):
        load_bundle(bundle.path)


USED = [
    "manifest.json",
    "router.safetensors",
    "chat_template.jinja",
    f"adapters/*/{CONFIG}",
    f"adapters/*/{WEIGHTS}",
]


def moved_out(file: Path, root: Path) -> None:
    target = root.parent / "elsewhere" / file.name
    file.rename(target)
    file.symlink_to(target)


def large(file: Path, root: Path) -> None:
    with file.open("r+b") as opened:
        opened.truncate(HUGE if file.name != WEIGHTS else 1 << 40)  # sparse, so it needs no disk space


def instead(make: Callable[[Path], None]) -> Callable[[Path, Path], None]:
    def apply(file: Path, root: Path) -> None:
        file.unlink()
        make(file)

    return apply


PLACES: dict[str, tuple[Callable[[Path, Path], Any], str]] = {
    "a link out": (moved_out, "leads out of"),
    "a link to a device": (instead(lambda file: file.symlink_to("/dev/zero")), "leads out of"),
    "a link to itself": (instead(lambda file: file.symlink_to(file)), "link"),
    "a FIFO": (instead(os.mkfifo), "not a regular file"),
    "a directory": (instead(Path.mkdir), "not a regular file"),
    "too large": (large, "more than the"),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", PLACES)
@pytest.mark.parametrize("name", USED)
def test_nothing_but_plain_files_inside(bundle: Bundle, name: str, kind: str) -> None:
    spoil, says = PLACES[kind]
    spoil(next(bundle.path.glob(name)), bundle.path)
    refused(bundle.path)
    with pytest.raises(BundleError, match=says):
        load_bundle(bundle.path)


@pytest.mark.parametrize("name", ["README.md", "notes.txt", "adapters/more"])
def test_what_is_not_read_leads_nowhere_either(bundle: Bundle, name: str) -> None:
    """``push`` would upload the target of the model card."""
    (bundle.path / name).unlink(missing_ok=True)
    (bundle.path / name).symlink_to("/etc/passwd")
    assert "leads out of" in refused(bundle.path)


def test_an_adapters_directory_that_leads_out(bundle: Bundle) -> None:
    directory = first_adapter(bundle.path)
    moved_out(directory, bundle.path)
    assert "leads out of" in refused(bundle.path)


def test_links_within_are_fine_and_the_bundle_may_be_one(bundle: Bundle, tmp_path: Path) -> None:
    file = bundle.path / "router.safetensors"
    file.rename(bundle.path / "kept")
    file.symlink_to("kept")
    (tmp_path / "current").symlink_to("bundle")
    assert load_bundle(tmp_path / "current").clusters == bundle.clusters


def test_distances_that_float32_cannot_hold(tmp_path: Path) -> None:
    far = np.full((2048, 1), 9e7, np.float32)
    wide = RoutingSpace(-far[:, 0], far, np.eye(2, 1, dtype=np.float32), (0, 1))
    with pytest.raises(BundleError, match="distances of the probe texts are not finite"):
        write_bundle(tmp_path / "b", wide, [0.5, 0.5], probe_vectors=np.full((3, 2048), 9e7, np.float32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_an_adapter_like_others(bundle: Bundle, dtype: torch.dtype) -> None:
    for directory in (bundle.path / "adapters").iterdir():
        held = load_file(directory / WEIGHTS)
        save_torch(
            {name: torch.from_numpy(array).to(dtype) for name, array in held.items()}, directory / WEIGHTS
        )
    reseal(bundle.path)
    vectors = np.random.default_rng(0).normal(size=(20, 8)).astype(np.float32)
    mine, theirs = (Router(one).route(vectors) for one in (bundle, load_bundle(bundle.path)))
    assert [d.distances for d in mine] == [d.distances for d in theirs]


def test_a_template_that_the_manifest_does_not_name_is_not_used(tmp_path: Path) -> None:
    plain = write_bundle(tmp_path / "plain", space(np.eye(8)[:2]), [0.5, 0.5])
    (plain.path / "chat_template.jinja").write_text("{{ messages }}")
    assert load_bundle(plain.path).chat_template is None

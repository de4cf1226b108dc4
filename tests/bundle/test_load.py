import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import MODULE, LetterEmbedder, adapter, space, write
from safetensors.numpy import load_file, save
from tamper import edit, first_adapter, reseal

from fedrouter.bundle import Bundle, check_embedder, load_bundle
from fedrouter.embed import probe
from fedrouter.errors import BundleError
from fedrouter.types import Guarantee, TaskCluster


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write(tmp_path / "bundle", space(np.eye(8)[:2]), [0.5, 0.5])


def test_what_was_written_is_loaded(bundle: Bundle) -> None:
    loaded = load_bundle(bundle.path)
    np.testing.assert_array_equal(loaded.space.centroids, np.eye(8)[:2])
    assert [c.name for c in loaded.clusters] == ["task-0", "task-1"]
    assert all(c.adapter.startswith(f"{c.name}-") for c in loaded.clusters)
    assert loaded.clusters[0].adapter != loaded.clusters[1].adapter
    assert not list(bundle.path.parent.glob(".*")), "nothing half written stays behind"


def test_the_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    one, two = (write(tmp_path / n, space(np.eye(8)[:2]), [0.5, 0.5]).path for n in ("one", "two"))
    files = [p.relative_to(one) for p in one.rglob("*") if p.is_file()]
    assert len(files) == 7
    assert all((one / f).read_bytes() == (two / f).read_bytes() for f in files)


def test_a_bundle_is_never_overwritten(bundle: Bundle) -> None:
    with pytest.raises(BundleError, match="never overwritten"):
        write(bundle.path, space(np.eye(8)[:2]), [0.5, 0.5])


def test_weights_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    bad = adapter(0)
    bad[f"{MODULE}.lora_B.weight"][0, 0] = np.nan
    with pytest.raises(BundleError, match="not finite"):
        write(tmp_path / "b", space(np.eye(8)[:1]), [1.0], adapters=[bad])
    assert not (tmp_path / "b").exists()


def edit_manifest(path: Path, **changes: object) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, **changes}))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no manifest": (lambda p: (p / "manifest.json").unlink(), "not a bundle"),
    "manifest is not JSON": (lambda p: truncate(p / "manifest.json"), "not readable as JSON"),
    "unknown schema": (lambda p: edit_manifest(p, schema_version=99), "schema version 99 is unknown"),
    "unknown field": (
        lambda p: edit_manifest(p, base={"model": "x", "surprise": 1}),
        r"base\.surprise|base\.revision",
    ),
    "unknown fallback": (lambda p: edit_manifest(p, fallback="guess"), "fallback: .*not 'guess'"),
    "no generalist": (lambda p: edit_manifest(p, fallback="generalist"), "there is no generalist adapter"),
    "lost generalist": (
        lambda p: edit_manifest(p, generalist="generalist-00000000"),
        "is not listed",
    ),
    "wrong rank": (lambda p: edit(p, "rank", to=4), "rank 2, but the manifest says 4"),
    "no adapter weights": (
        lambda p: (first_adapter(p) / "adapter_model.safetensors").unlink(),
        "no such file",
    ),
    "no adapter config": (
        lambda p: (first_adapter(p) / "adapter_config.json").unlink(),
        "no such file",
    ),
    "no adapter at all": (lambda p: shutil.rmtree(first_adapter(p)), "no such file"),
    "truncated weights": (
        lambda p: truncate(first_adapter(p) / "adapter_model.safetensors"),
        "content differs",
    ),
    "changed weights": (lambda p: flip(first_adapter(p) / "adapter_model.safetensors"), "content differs"),
    "truncated router": (lambda p: truncate(p / "router.safetensors"), "content differs"),
    "changed router": (lambda p: flip(p / "router.safetensors"), "content differs"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_bundle_is_refused_with_the_reason(bundle: Bundle, damage: str) -> None:
    spoil, reason = DAMAGES[damage]
    spoil(bundle.path)
    with pytest.raises(BundleError, match=reason) as caught:
        load_bundle(bundle.path)
    assert "\n" not in str(caught.value)


def test_the_generalist_is_an_adapter_like_the_others(tmp_path: Path) -> None:
    bundle = write(tmp_path / "b", space(np.eye(8)[:2]), [1, 1], generalist=adapter(7), fallback="generalist")
    loaded = load_bundle(bundle.path)
    assert loaded.generalist is not None
    assert loaded.generalist.startswith("generalist-")
    assert list(loaded.adapter_paths) == [*(c.adapter for c in loaded.clusters), loaded.generalist]
    held = load_file(loaded.adapter_paths[loaded.generalist] / "adapter_model.safetensors")
    for name, array in adapter(7).items():
        np.testing.assert_array_equal(held[name], array)
    with pytest.raises(BundleError, match="differ in name or shape"):
        write(tmp_path / "c", space(np.eye(8)[:1]), [1], generalist=adapter(7, width=5))


def test_shapes_of_all_adapters_must_agree(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="differ in name or shape"):
        write(tmp_path / "b", space(np.eye(8)[:2]), [1, 1], adapters=[adapter(0), adapter(1, width=7)])


def test_a_factor_without_counterpart_is_refused(tmp_path: Path) -> None:
    alone = {k: v for k, v in adapter(0).items() if "lora_A" in k}
    with pytest.raises(BundleError, match="no counterpart"):
        write(tmp_path / "b", space(np.eye(8)[:1]), [1], adapters=[alone])


def test_the_embedder_is_known_by_what_it_computes(tmp_path: Path) -> None:
    letters = LetterEmbedder()
    bundle = write(tmp_path / "b", space(np.eye(8)[:1]), [1], probe_vectors=probe(letters))
    check_embedder(bundle, letters)

    class Louder(LetterEmbedder):
        def embed(self, texts):  # type: ignore[no-untyped-def]
            return super().embed(texts) * 1.5

    with pytest.raises(BundleError, match=r"differ by 50\.0%"):
        check_embedder(bundle, Louder())


def test_clusters_and_centroids_must_fit(tmp_path: Path) -> None:
    one = [TaskCluster("only", "", 1, (), {}, 1.0)]
    with pytest.raises(BundleError, match="does not number the manifest's task clusters"):
        write(tmp_path / "b", space(np.eye(8)[:2]), [1.0], clusters=one, adapters=[adapter(0)])


def test_what_noise_promises_is_recorded_and_only_then(tmp_path: Path) -> None:
    promise = Guarantee("client", "its updates", 30, 4.2, 1e-6)
    bundle = write(tmp_path / "noisy", space(np.eye(8)[:2]), [1.0, 1.0], guarantees=[promise])
    assert load_bundle(bundle.path).guarantees == (promise,)
    assert (
        "ε = 4.2, δ = 1e-06 for all rows of a client: its updates" in (bundle.path / "README.md").read_text()
    )
    plain = write(tmp_path / "plain", space(np.eye(8)[:2]), [1.0, 1.0])
    assert load_bundle(plain.path).guarantees == ()
    assert "privacy" not in (plain.path / "manifest.json").read_text()


def test_the_map_shows_what_sets_centroids_apart(tmp_path: Path) -> None:
    centroids = np.zeros((3, 8))
    centroids[0, 5], centroids[1, 2] = 9, -4
    flat = load_bundle(write(tmp_path / "bundle", space(centroids), [0.5] * 3).path).space.map
    assert flat is not None
    assert flat.shape == (8, 2)
    apart = np.linalg.norm(centroids[:, None] - centroids[None], axis=2)
    drawn = centroids @ flat
    np.testing.assert_allclose(np.linalg.norm(drawn[:, None] - drawn[None], axis=2), apart, atol=1e-5)


@pytest.mark.parametrize("num", [1, 2])
def test_one_or_two_task_clusters_have_a_map_too(tmp_path: Path, num: int) -> None:
    flat = load_bundle(write(tmp_path / "bundle", space(np.eye(8)[:num]), [0.5] * num).path).space.map
    assert flat is not None
    assert np.isfinite(flat).all()


def test_a_bundle_from_before_the_map_is_read(bundle: Bundle) -> None:
    file = bundle.path / "router.safetensors"
    file.write_bytes(save({name: array for name, array in load_file(file).items() if name != "map"}))
    reseal(bundle.path)
    assert load_bundle(bundle.path).space.map is None


def test_a_map_of_another_shape_is_refused(bundle: Bundle) -> None:
    file = bundle.path / "router.safetensors"
    file.write_bytes(save({**load_file(file), "map": np.zeros((8, 3), np.float32)}))
    reseal(bundle.path)
    with pytest.raises(BundleError, match="names, dtypes or shapes"):
        load_bundle(bundle.path)


def test_probes_that_are_none_or_changed_are_refused(tmp_path: Path) -> None:
    line = b'{"prompt": "x", "cluster": null}\n'
    bundle = write(tmp_path / "bundle", space(np.eye(8)[:2]), [0.5, 0.5], probes=line)
    assert [probe.turns for probe in bundle.probes] == [("x",)]
    (bundle.path / "probes.jsonl").write_bytes(line * 2)
    with pytest.raises(BundleError, match="differs from what the manifest records"):
        load_bundle(bundle.path)
    (bundle.path / "probes.jsonl").write_bytes(b"{}\n")
    reseal(bundle.path)
    with pytest.raises(BundleError, match=r"probes.jsonl, line 1"):
        load_bundle(bundle.path)


def test_probes_that_the_manifest_does_not_list_are_refused(tmp_path: Path) -> None:
    bundle = write(tmp_path / "bundle", space(np.eye(8)[:2]), [0.5, 0.5])
    (bundle.path / "probes.jsonl").write_bytes(b'{"prompt": "x", "cluster": null}\n')
    with pytest.raises(BundleError, match=r"probes.jsonl: not part of the bundle.*train with routing.probes"):
        load_bundle(bundle.path)

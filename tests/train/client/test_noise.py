"""Noise is applied, has the claimed size, and is accounted for."""

import math
import re
import stat
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

import dp_accounting
import numpy as np
import pytest
from fakes import adapter
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy.stats import norm
from watched import (
    CONFIG,
    DIM,
    DOC,
    TaskEmbedder,
    Trainer,
    Watched,
    clients,
    inspect,
    listed,
    same,
    whole_run,
)

from fedrouter.config import Config, PrivacySettings
from fedrouter.errors import TrainingError
from fedrouter.train.client import noise
from fedrouter.train.client.noise import Noise
from fedrouter.train.disk.promises import keep_promises, noise_key
from fedrouter.train.federation import DISCOVERY_RELEASES
from fedrouter.train.lora import distance
from fedrouter.train.server.accountant import epsilon, guarantees
from fedrouter.types import Array, Assignment, Float64s, RoutingSpace, Subset

PRIVACY = PrivacySettings(clip_embeddings=30.0, centroid_noise=1.0, clip_updates=0.5, update_noise=2.0)
KMEANS = {"cluster": {"method": "kmeans", "local": 2, "global": 2}, "train": {"rounds": 3, "steps": 4}}


def noisy_config(**privacy: float) -> Config:
    return Config.model_validate({**KMEANS, "privacy": {**PRIVACY.model_dump(), **privacy}})


def space() -> RoutingSpace:
    centroids = np.eye(DIM, dtype=np.float32)[:3] * 5
    return RoutingSpace(np.zeros(DIM, np.float32), np.eye(DIM, dtype=np.float32), centroids, (0, 1, 1))


def test_the_multiplier_is_the_noise_in_units_of_the_sensitivity() -> None:
    value = np.arange(6, dtype=np.float64)
    drawn = [Noise(bytes([i, i // 256]), "c").release(value, 3.0, 0.5, "x") - value for i in range(250)] + [
        Noise(b"secret", "c").release(value, 3.0, 0.5, i) - value for i in range(250)
    ]
    assert np.std(drawn) == pytest.approx(1.5, rel=0.06)
    assert abs(np.mean(drawn)) < 0.1
    assert abs(np.corrcoef(np.array(drawn).T)[np.triu_indices(6, 1)]).max() < 0.2


@pytest.mark.parametrize(("norm_", "multiplier"), [(0.5, 2.0), (0.1, 0.3)])
def test_an_update_is_clipped_and_trained_tensors_get_noise(norm_: float, multiplier: float) -> None:
    sent, trained = adapter(0), adapter(1)
    privacy = PrivacySettings(clip_updates=norm_, update_noise=multiplier)
    only_b = [n for n in sorted(sent) if "lora_B" in n]
    clipped = noise.update(sent, trained, sorted(sent), PrivacySettings(clip_updates=norm_), Noise(b"", "c"))
    assert distance(sent, clipped) == pytest.approx(norm_, rel=1e-4)
    found = [noise.update(sent, trained, only_b, privacy, Noise(b"k", "c"), i) for i in range(200)]
    spread = np.std([f[only_b[0]] - clipped[only_b[0]] for f in found])
    assert spread == pytest.approx(2 * norm_ * multiplier, rel=0.05)
    other = next(n for n in sent if "lora_A" in n)
    assert all((f[other] == clipped[other]).all() for f in found)


class Replay(Noise):
    """Repeats given releases whatever the rows are, and records the values before noise."""

    def __init__(self, answers: list[Float64s] | None = None):
        super().__init__(b"k", "c")
        self.answers, self.values, self.bounds = list(answers or ()), [], []  # type: ignore[var-annotated]
        self.given: list[Float64s] = []

    def release(self, value: Float64s, sensitivity: float, multiplier: float, *asked: object) -> Float64s:
        self.values.append(value)
        self.bounds.append(sensitivity)
        answer = (
            self.answers.pop(0) if self.answers else super().release(value, sensitivity, multiplier, *asked)
        )
        self.given.append(answer)
        return answer


def tell(x: Array, using: Replay) -> None:
    noise.summarise(x, np.zeros(DIM), 3, 0, PRIVACY, using)
    noise.assign(x, space(), PRIVACY, using)


@settings(max_examples=50, deadline=None)
@given(row=st.integers(0, 39), scale=st.sampled_from([0.1, 10.0, 1e4]), seed=st.integers(0, 1000))
def test_replacing_a_row_changes_no_release_by_more_than_its_bound(row: int, scale: float, seed: int) -> None:
    """The premise of the accounting: equal earlier releases, but one different row."""
    rng = np.random.default_rng(seed)
    x = (20 * rng.normal(size=(40, DIM))).astype(np.float32)
    other = x.copy()
    other[row] = scale * rng.normal(size=DIM)
    first = Replay()
    tell(x, first)
    second = Replay(first.given)
    tell(other, second)
    assert len(first.values) == DISCOVERY_RELEASES
    moved = [float(np.linalg.norm(a - b)) for a, b in zip(first.values, second.values, strict=True)]
    assert all(m <= bound + 1e-9 for m, bound in zip(moved, first.bounds, strict=True))
    assert max(moved) > 0


@given(seeds=st.lists(st.integers(0, 100), min_size=3, max_size=3, unique=True))
def test_any_two_updates_differ_by_at_most_the_bound(seeds: list[int]) -> None:
    sent, *trained = (adapter(seed) for seed in seeds)
    replays = [Replay(), Replay()]
    for one, using in zip(trained, replays, strict=True):
        noise.update(sent, one, sorted(sent), PRIVACY, using, 0, 0)
    assert np.linalg.norm(replays[0].values[0] - replays[1].values[0]) <= replays[0].bounds[0] + 1e-6


def test_epsilon_equals_the_gaussian_mechanism() -> None:
    for multiplier in (0.5, 1.0, 4.0):
        found = epsilon([multiplier], 1e-5)
        # The δ for this ε: Balle and Wang 2018, theorem 5.
        a, b = 1 / (2 * multiplier), found * multiplier
        assert norm.cdf(a - b) - math.exp(found) * norm.cdf(-a - b) == pytest.approx(1e-5, rel=1e-6)


def test_composition_equals_the_accounting_package() -> None:
    accountant = dp_accounting.pld.PLDAccountant()
    accountant.compose(dp_accounting.GaussianDpEvent(3.0), 5)
    accountant.compose(dp_accounting.GaussianDpEvent(8.0), 30)
    want = accountant.get_epsilon(1e-6)
    assert epsilon([3.0] * 5 + [8.0] * 30, 1e-6) == pytest.approx(want, rel=1e-3)
    assert epsilon([4.0], 1e-5) == pytest.approx(dp_accounting.get_epsilon_gaussian(4.0, 1e-5))


def test_every_release_of_a_run_is_accounted_for(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: Counter[str] = Counter()
    release = Noise.release

    def count(self: Noise, *arguments: Any) -> Float64s:
        counts[self._client] += 1
        return release(self, *arguments)

    monkeypatch.setattr(Noise, "release", count)
    members = clients(privacy=noisy_config().privacy)
    federation = Watched(members)
    whole_run(federation, noisy_config())
    assignments = [message for name, _, message in federation.seen if name == "assign"]
    row, client, averaged, whole = guarantees(noisy_config(), assignments)
    assert [g.unit for g in (row, client, averaged, whole)] == ["row", "client", "client", "row"]
    assert averaged.epsilon < client.epsilon
    assert whole.num_releases == row.num_releases + client.num_releases == max(counts.values())
    assert client.num_releases == 4, "each of two subsets in two of three rounds"
    assert row.epsilon == pytest.approx(epsilon([1.0 / math.sqrt(5)], 1e-5), rel=1e-3)
    assert max(row.epsilon, client.epsilon) < whole.epsilon


def test_averages_contain_the_noise_of_all_clients() -> None:
    """Four clients with equal steps double the multiplier; a median is not a sum and gives no guarantee."""
    distances = np.zeros(101, np.float32)
    assignments = [Assignment(str(i), (Subset(0, 10, distances, {}),)) for i in range(4)]
    values = {
        "train": {"rounds": 3, "schedule": "all"},
        "privacy": {"clip_updates": 1.0, "update_noise": 4.0},
    }
    client, averaged = guarantees(Config.model_validate(values), assignments)
    assert client.epsilon == pytest.approx(epsilon([4.0] * 3, 1e-5), rel=1e-3)
    assert averaged.epsilon == pytest.approx(epsilon([8.0] * 3, 1e-5), rel=1e-3)
    robust = Config.model_validate({**values, "aggregate": {"robust": "median"}})
    assert guarantees(robust, assignments) == [client]
    uneven = [*assignments[:3], Assignment("big", (*assignments[0].subsets, Subset(1, 10, distances, {})))]
    _, worst = guarantees(Config.model_validate(values), uneven)
    assert worst.epsilon > averaged.epsilon
    alone = guarantees(Config.model_validate(values), assignments[:1])
    assert alone[0].epsilon == alone[1].epsilon


def test_with_noise_nothing_else_is_revealed() -> None:
    members = clients(privacy=noisy_config().privacy)
    federation = Watched(members)
    whole_run(federation, noisy_config())
    assert inspect(federation, members) <= listed()
    messages = [message for _, _, message in federation.seen]
    assert not any(m.scatter.any() for m in messages if hasattr(m, "scatter"))
    assert all(s.task_counts == {} for m in messages if hasattr(m, "subsets") for s in m.subsets)
    replies = [m for m in messages if hasattr(m, "seconds")]
    assert replies
    assert {(r.loss, r.seconds) for r in replies} == {(None, 0.0)}
    with pytest.raises(TrainingError, match="reveals nothing"):
        members[0].regroup(space())


def test_an_empty_subset_gets_a_reply_like_any_other() -> None:
    (member,) = clients(privacy=noisy_config().privacy)[:1]
    member._rows = {0: np.array([], dtype=int)}
    request = next(
        request for name, (requests,), _ in trained_run().seen if name == "train" for request in requests
        if request.cluster == 0
    )  # fmt: skip
    reply = member.train(request, Trainer())  # type: ignore[arg-type]
    assert reply.num_examples == request.steps * Trainer.batch_size
    assert distance(request.adapter, reply.adapter) > 0.1


def trained_run(key: bytes = b"k", **privacy: float) -> Watched:
    config = noisy_config(**privacy)
    federation = Watched(clients(privacy=config.privacy, key=key))
    whole_run(federation, config)
    return federation


def test_only_the_same_secret_gives_the_same_messages() -> None:
    assert same(trained_run(), trained_run())
    assert not same(trained_run(), trained_run(key=b"another"))


def test_other_requests_or_rows_get_independent_noise() -> None:
    one, value = Noise(b"k", "ulm"), np.zeros(50)
    drawn = one.release(value, 1, 1, "summarise", 2)
    assert (drawn == one.release(value, 1, 1, "summarise", 2)).all()
    for other in (
        one.release(value, 1, 1, "summarise", 3),
        one.release(value + 1e-9, 1, 1, "summarise", 2),
        Noise(b"k", "bern").release(value, 1, 1, "summarise", 2),
    ):
        assert abs(np.corrcoef(drawn, other)[0, 1]) < 0.5


def test_without_noise_nothing_changes() -> None:
    plain, zero = Watched(clients()), Watched(clients(privacy=PrivacySettings(clip_updates=1e9), key=b"x"))
    whole_run(plain)
    whole_run(zero, CONFIG.model_copy(update={"privacy": PrivacySettings(clip_updates=1e9)}))
    assert same(plain, zero)


def test_clusters_are_found_despite_little_noise() -> None:
    member = clients(num=400, privacy=PRIVACY)[0]
    found = member.summarise(2)
    centres = TaskEmbedder().embed(["colours x", "numbers x"])
    gaps = np.linalg.norm(found.centroids[:, None] - centres, axis=-1)
    assert sorted(gaps.argmin(1)) == [0, 1]


def test_the_secret_is_random_stored_once_and_readable_by_its_owner_only(tmp_path: Path) -> None:
    key = noise_key(tmp_path, PRIVACY)
    assert len(key) == 32
    assert key != noise_key(tmp_path, PRIVACY), "the key is stored only when the rounds start"
    for _ in range(2):  # a resumed run writes it again
        keep_promises(tmp_path, PRIVACY, [], key)
        assert noise_key(tmp_path, PRIVACY) == key
    assert stat.S_IMODE((tmp_path / "noise.key").stat().st_mode) == 0o600
    assert noise_key(tmp_path, PrivacySettings()) == b""


def test_the_documented_example_is_valid() -> None:
    (example,) = re.findall(r"```toml\n(.*?)```", DOC.read_text(encoding="utf-8"), re.DOTALL)
    assert Config.model_validate(tomllib.loads(example)).privacy.noisy


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"privacy": {"centroid_noise": 1.0}}, "need each other"),
        ({"privacy": {"clip_embeddings": 1.0}}, "need each other"),
        ({"privacy": {"update_noise": 1.0}}, "needs privacy.clip_updates"),
        ({"privacy": {"delta": 1e-6}}, "privacy.delta is only for"),
        ({"privacy": {"centroid_noise": 1.0, "clip_embeddings": 1.0}}, "cluster.method kmeans"),
        (
            {"privacy": {"update_noise": 1.0, "clip_updates": 1.0}, "train": {"validation": 0.1}},
            "does not cover validation",
        ),
        (
            {
                "privacy": {"update_noise": 1.0, "clip_updates": 1.0},
                "cluster": {"every": 2},
                "data": {"clients": {"a": "a.jsonl"}},
            },
            "accounted for a single clustering",
        ),
        ({"privacy": {"min_cluster_size": 0}}, "greater than or equal to 1"),
        ({"privacy": {"noise": 1.0}}, "Extra inputs"),
    ],
)
def test_incompatible_options_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Config.model_validate(values)

"""The secure sum: exact, hiding, and robust to clients that drop out."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import adapter
from hypothesis import given
from hypothesis import strategies as st

from fedrouter.errors import WireError
from fedrouter.train.client.summing import Summing, weighted
from fedrouter.train.lora import average, distance
from fedrouter.train.server.summing import secure_sums
from fedrouter.train.wire.keys import PrivateKey, new_key, public_text
from fedrouter.train.wire.masks import fixed, loose, restored, shared, threshold
from fedrouter.train.wire.messages import (
    Masked,
    Refused,
    SumKeys,
    SumOpen,
    SumShares,
    SumTrain,
)
from fedrouter.types import TrainFailure, TrainReply, TrainRequest

SENT = adapter(9)


class Group:
    """Sites in a secure sum, and all replies that the server has seen."""

    def __init__(self, directory: Path, names: Sequence[str], least: int = 3):
        self.names = names
        self.secrets: dict[str, PrivateKey] = {n: new_key(directory / n / "site.key") for n in names}
        self.roster = {n: public_text(key.public_key()) for n, key in self.secrets.items()}
        self.sites = {
            n: Summing("run", n, self.secrets[n], directory / n / "peers.json", least) for n in names
        }
        self.updates = {n: self.reply(n, i) for i, n in enumerate(names)}
        self.gone: Callable[[str, Any], bool] = lambda _name, _message: False
        self.seen: list[Any] = []

    def reply(self, name: str, i: int) -> TrainReply:
        return TrainReply(
            name, 0, {k: a + adapter(i)[k] / np.float32(10) for k, a in SENT.items()}, 4 + i, 1.0 + i, 0.0
        )

    def requests(self, number: int = 0) -> list[TrainRequest]:
        return [TrainRequest(name, 0, number, SENT, 5, 1e-3) for name in self.names]

    def ask(self, asked: Mapping[str, Sequence[Any]]) -> Mapping[str, Sequence[Any]]:
        answers = {}
        for name, messages in asked.items():
            if not any(self.gone(name, message) for message in messages):
                answers[name] = [self.answer(name, message) for message in messages]
        self.seen += [reply for own in answers.values() for reply in own]
        return answers

    def answer(self, name: str, message: Any) -> Any:
        site = self.sites[name]
        try:
            match message:
                case SumKeys():
                    return site.keys(message)
                case SumShares():
                    return site.shares(message)
                case SumTrain():
                    site.take(message.request, message.shares)
                    return site.masked(message.request, self.updates[name])
                case SumOpen():
                    return site.opened(message)
        except WireError as error:
            return Refused(str(error))

    def run(self, number: int = 0) -> dict[str, TrainReply | TrainFailure]:
        found = secure_sums("run", self.requests(number), self.roster, self.ask)
        return {answer.client: answer for answer in found}

    def mean(self, names: Sequence[str]) -> Any:
        own = [self.updates[name] for name in names]
        return average([reply.adapter for reply in own], [reply.num_examples for reply in own])


NAMES = ("bern", "graz", "oslo", "ulm", "wien")


def test_the_sum_is_exact_and_hides_each_update(tmp_path: Path) -> None:
    group = Group(tmp_path, NAMES)
    found = group.run()
    want = group.mean(NAMES)
    for answer in found.values():
        assert isinstance(answer, TrainReply)
        assert max(np.abs(answer.adapter[n] - want[n]).max() for n in want) < 1e-6
        assert 0 < answer.num_examples <= 5 * 4
    weights = [group.updates[name].num_examples for name in NAMES]
    losses = np.array([group.updates[name].loss for name in NAMES], dtype=float)
    loss = np.average(losses, weights=weights)
    assert found["ulm"].loss == pytest.approx(loss, abs=1e-6)  # type: ignore[union-attr]
    for masked in (one for one in group.seen if isinstance(one, Masked)):
        plain = weighted(group.requests()[0], group.updates[masked.client])
        bits = np.unpackbits(masked.values.view(np.uint8))
        assert abs(bits.mean() - 0.5) < 5 * 0.5 / np.sqrt(len(bits)), "a masked update looks random"
        assert abs(np.corrcoef(masked.values.astype(float), plain)[0, 1]) < 0.8
        assert not np.isclose(loose(masked.values.view(np.uint64)), plain, atol=1.0).any()


@pytest.mark.parametrize("stage", [SumKeys, SumShares, SumTrain, SumOpen])
@pytest.mark.parametrize("num_gone", [1, 2])
def test_dropped_clients_are_named_and_the_others_are_summed(
    tmp_path: Path, stage: type, num_gone: int
) -> None:
    group = Group(tmp_path, NAMES)
    lost = NAMES[:num_gone]
    group.gone = lambda name, message: name in lost and isinstance(message, stage)
    found = group.run()
    in_it = NAMES if stage is SumOpen else NAMES[num_gone:]  # their updates have already arrived
    want = group.mean(in_it)
    for name, answer in found.items():
        assert isinstance(answer, TrainReply) == (name in in_it), answer
        if isinstance(answer, TrainReply):
            assert max(np.abs(answer.adapter[n] - want[n]).max() for n in want) < 1e-6
        else:
            assert "dropped out of the sum" in answer.reason
    again = group
    again.gone = lambda _name, _message: False
    assert all(isinstance(answer, TrainReply) for answer in again.run(1).values()), (
        "the next round is complete"
    )


def test_too_few_clients_are_not_summed(tmp_path: Path) -> None:
    pair = Group(tmp_path / "a", NAMES[:2])
    assert {a.reason for a in pair.run().values() if isinstance(a, TrainFailure)} == {
        "2 clients are too few for a secure sum; it needs 3"
    }
    assert not pair.seen, "no client was asked"
    three = Group(tmp_path / "b", NAMES[:3])
    three.gone = lambda name, message: name == "bern" and isinstance(message, SumTrain)
    assert all(isinstance(answer, TrainFailure) for answer in three.run().values())


def test_a_site_opens_a_sum_once_and_never_for_few_clients(tmp_path: Path) -> None:
    group = Group(tmp_path, NAMES)
    group.run()
    again = group.answer("ulm", SumOpen(0, 0, NAMES[:3]))
    assert again == Refused("this sum was opened already")
    assert group.answer("ulm", SumKeys(0, 0, NAMES[1:])) == Refused("this round was summed already")
    group.gone = lambda _name, message: isinstance(message, SumOpen)
    group.run(1)
    few = group.answer("ulm", SumOpen(0, 1, NAMES[:2]))
    assert few == Refused("a sum of 2 clients must not be opened")


def test_a_site_refuses_a_sum_below_its_minimum(tmp_path: Path) -> None:
    group = Group(tmp_path, NAMES, least=6)
    assert {getattr(answer, "reason", None) for answer in group.run().values()} == {
        "a sum of 5 clients; this site takes part in 6 or more"
    }


def test_keys_forged_by_the_server_are_refused(tmp_path: Path) -> None:
    group, other = Group(tmp_path / "a", NAMES), Group(tmp_path / "b", NAMES)
    group.run()  # every site has now pinned the others' keys
    group.roster["bern"] = other.roster["bern"]
    reasons = {n: getattr(a, "reason", "") for n, a in group.run(1).items()}
    assert all("client bern has another key than the first time" in reasons[n] for n in NAMES if n != "bern")

    fresh = Group(tmp_path / "c", NAMES)
    ask = fresh.ask

    def swapping(asked: Mapping[str, Sequence[Any]]) -> Mapping[str, Sequence[Any]]:
        return {
            name: [replace(r, mask=r.mask[::-1].copy()) if hasattr(r, "mask") else r for r in own]
            for name, own in ask(asked).items()
        }

    answers = list(secure_sums("run", fresh.requests(), fresh.roster, swapping))
    assert {getattr(a, "reason", "") for a in answers} == {
        "keys for a sum that are not signed by their owner"
    }


@given(secret=st.binary(min_size=32, max_size=32), num=st.integers(2, 9), data=st.data())
def test_enough_shares_restore_the_secret_and_fewer_do_not(
    secret: bytes, num: int, data: st.DataObject
) -> None:
    names = [f"c{i}" for i in range(num)]
    least = threshold(num)
    shares = shared(secret, names, least)
    some = data.draw(st.permutations(names))[:least]
    assert restored({name: shares[name] for name in some}, names, least) == secret
    with pytest.raises(WireError):
        restored({name: shares[name] for name in some[1:]}, names, least)


@given(values=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20), num=st.integers(1, 64))
def test_fixed_point_is_exact_to_half_a_step(values: list[float], num: int) -> None:
    exact = np.array(values)
    found = loose(fixed(exact, num))
    assert np.abs(found - exact).max() <= 0.5 / 2**28
    with pytest.raises(WireError, match="too large to be summed"):
        fixed(np.array([2.0**34]), 64)


def test_the_mean_update_is_not_longer_than_the_longest_one(tmp_path: Path) -> None:
    group = Group(tmp_path, NAMES)
    (first, *_) = group.run().values()
    assert isinstance(first, TrainReply)
    assert 0 < distance(SENT, first.adapter) < max(distance(SENT, r.adapter) for r in group.updates.values())

"""Misbehaving clients and connections: refusals, clients left out, and runs that continue."""

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import adapter
from loopback import Answer, Loopback
from rich.console import Console
from watched import CONFIG, DIM, TaskEmbedder, Trainer, rows

from fedrouter.config import Config
from fedrouter.errors import ClientError, TrainingError
from fedrouter.train.client.client import Client
from fedrouter.train.client.resident import Resident
from fedrouter.train.client.site import Policy, Site, SiteSettings
from fedrouter.train.local import LocalFederation
from fedrouter.train.server.loop import run_rounds
from fedrouter.train.server.methods import group
from fedrouter.train.server.remote import RemoteFederation, Waiting
from fedrouter.train.state import fresh_state
from fedrouter.train.wire.keys import PublicKey, new_key
from fedrouter.train.wire.messages import Envelope, Hello, Refused, Summarise, seal, unseal
from fedrouter.types import Assignment, LocalClusters, TrainFailure, TrainReply, TrainRequest

NAMES = ("ulm", "bern", "graz")
PROBE = np.ones((3, DIM), np.float32)
WAITING = Waiting(start_s=20, least_clients=2, exchange_s=50, round_s=50, absent_s=20)


class Place:
    """A site with a fake model."""

    def __init__(self, directory: Path, name: str, **policy: Any):
        settings = SiteSettings(name=name, data="rows.jsonl", policy=Policy(**policy))
        self.site, self.name = Site(directory / name, settings), name
        self.key: PublicKey = new_key(self.site.key).public_key()
        self.start()

    def start(self) -> None:
        """Start or restart the resident client; only its files survive a restart."""
        self.said = io.StringIO()
        self.resident = Resident(self.site, self.opened, Console(file=self.said))

    def opened(self, config: Config, secret: bytes) -> tuple[LocalFederation, str, Any]:
        number = NAMES.index(self.name) if self.name in NAMES else 7
        client = Client(self.name, rows(number), TaskEmbedder(), 0, config.privacy, secret)
        return LocalFederation([client], Trainer()), "base", PROBE  # type: ignore[arg-type]

    def answer(self, body: bytes) -> bytes:
        return self.resident.answer(body)


def hello(secure: bool = False, **changes: object) -> Hello:
    settings = json.loads(CONFIG.model_dump_json(by_alias=True, exclude={"data"}))
    return Hello(json.dumps({**settings, **changes}), "base", PROBE, secure=secure)


class Wire:
    """A federation of places, and the lines that its server reported."""

    def __init__(self, places: list[Place], waiting: Waiting = WAITING, plan: Hello | None = None):
        self.lines: list[str] = []
        nodes: dict[str, Answer | None] = {f"node-{place.name}": place.answer for place in places}
        self.transport = Loopback(nodes)
        roster = {place.name: place.key for place in places}
        self.federation = RemoteFederation(
            self.transport,
            roster,
            "run",
            plan or hello(),
            waiting,
            self.lines.append,
            clock=self.transport.clock,
        )

    def said(self, text: str) -> bool:
        return any(text in line for line in self.lines)


@pytest.fixture
def places(tmp_path: Path) -> list[Place]:
    return [Place(tmp_path, name) for name in NAMES]


def request(client: str, number: int = 0, **changes: Any) -> TrainRequest:
    return replace(TrainRequest(client, 0, number, adapter(0), 2, 1e-3), **changes)


def joined(wire: Wire) -> list[Any]:
    """Connect all clients and assign them to task clusters."""
    wire.federation.members()
    found = group(wire.federation, CONFIG, adapter(0), DIM)
    return list(found.assignments)


def by_client(answers: Any) -> dict[str, TrainReply | TrainFailure]:
    return {answer.client: answer for answer in answers}


def test_remote_rounds_equal_local_rounds(places: list[Place]) -> None:
    wire = Wire(places)
    members = wire.federation.members()
    assert [m.client for m in members] == sorted(NAMES)
    local = LocalFederation(
        [place.opened(CONFIG, b"")[0].clients[place.name] for place in sorted(places, key=lambda p: p.name)],
        Trainer(),  # type: ignore[arg-type]
    )
    ends = []
    for federation in (wire.federation, local):
        found = group(federation, CONFIG, adapter(0), DIM)
        *_, last = run_rounds(federation, found.assignments, found.state, CONFIG)
        ends.append(last.state)
    for mine, theirs in zip(*(state.adapters for state in ends), strict=True):
        assert all(mine[name].tobytes() == theirs[name].tobytes() for name in mine)
    assert ends[0].losses == ends[1].losses
    assert [b.validation for b in ends[0].best if b] == [b.validation for b in ends[1].best if b]


def test_unknown_clients_and_stolen_names_are_rejected(places: list[Place], tmp_path: Path) -> None:
    wire = Wire(places)
    stranger, thief = Place(tmp_path / "elsewhere", "oslo"), Place(tmp_path / "elsewhere", "ulm")
    wire.transport.here |= {"node-oslo": stranger.answer, "node-thief": thief.answer}
    assert len(wire.federation.members()) == 3
    joined(wire)
    assert wire.said("node node-oslo rejected: client 'oslo' is not in the roster")
    assert wire.said("node node-thief rejected: a reply as client 'ulm' that is not signed with its key")
    answers = by_client(wire.federation.train([request(name) for name in NAMES]))
    assert all(isinstance(answer, TrainReply) for answer in answers.values())


def test_replies_of_an_earlier_round_or_another_site_are_ignored(places: list[Place]) -> None:
    wire = Wire(places)
    joined(wire)
    old: dict[str, bytes] = {}

    def recording(place: Place) -> Callable[[bytes], bytes]:
        def answer(body: bytes) -> bytes:
            old.setdefault(place.name, place.answer(body))
            return old[place.name]

        return answer

    wire.transport.here["node-ulm"] = recording(places[0])
    first = by_client(wire.federation.train([request(name) for name in NAMES]))
    assert isinstance(first["ulm"], TrainReply)
    again = by_client(wire.federation.train([request(name, 1) for name in NAMES]))
    assert again["ulm"] == TrainFailure("ulm", 0, "it did not answer within 50 s")
    assert wire.said("client ulm: ignored a reply that is late or answers another request")
    assert isinstance(again["bern"], TrainReply)
    wire.transport.here["node-ulm"] = places[1].answer  # bern's, under ulm's connection
    third = by_client(wire.federation.train([request(name, 2) for name in NAMES]))
    assert isinstance(third["ulm"], TrainFailure)
    assert isinstance(third["graz"], TrainReply)


def test_a_site_refuses_a_replayed_request(places: list[Place]) -> None:
    wire = Wire(places[:2])
    joined(wire)
    list(wire.federation.train([request("ulm")]))
    node, body = wire.transport.sent[-1]
    assert node == "node-ulm"
    places[0].start()  # used numbers survive a restart
    signed = places[0].answer(body)
    from fedrouter.train.wire.keys import claimed
    from fedrouter.train.wire.messages import REPLIES

    (reply,) = unseal(claimed(signed)[2], REPLIES, 1 << 20).messages
    assert isinstance(reply, Refused)
    assert "a replay" in reply.reason


def test_a_straggler_is_named_and_left_out_of_one_round(places: list[Place]) -> None:
    wire = Wire(places)
    joined(wire)
    wire.transport.here["node-graz"] = None
    answers = by_client(wire.federation.train([request(name) for name in NAMES]))
    assert answers["graz"] == TrainFailure("graz", 0, "it did not answer within 50 s")
    assert wire.said("client graz: it did not answer within")
    wire.transport.here["node-graz"] = places[2].answer
    answers = by_client(wire.federation.train([request(name, 1) for name in NAMES]))
    assert isinstance(answers["graz"], TrainReply)


def test_a_disconnected_client_may_come_back_at_another_address(places: list[Place]) -> None:
    wire = Wire(places, replace(WAITING, round_s=600))
    joined(wire)
    del wire.transport.here["node-graz"]
    answers = by_client(wire.federation.train([request(name) for name in NAMES]))
    assert answers["graz"] == TrainFailure("graz", 0, "it was not connected")
    places[2].start()
    wire.transport.here["node-9"] = places[2].answer  # another address, the same key
    answers = by_client(wire.federation.train([request(name, 1) for name in NAMES]))
    assert isinstance(answers["graz"], TrainReply)
    assert wire.said("client graz is back")


def test_a_restarted_site_gives_the_same_updates(places: list[Place]) -> None:
    wire = Wire(places)
    joined(wire)
    whole = by_client(wire.federation.train([request(name) for name in NAMES]))
    places[0].start()
    again = by_client(wire.federation.train([request(name) for name in NAMES]))
    assert wire.said("client ulm was restarted: sending it the plan again")
    for name in NAMES:
        one, other = whole[name], again[name]
        assert isinstance(one, TrainReply)
        assert isinstance(other, TrainReply)
        assert all(one.adapter[n].tobytes() == other.adapter[n].tobytes() for n in one.adapter)


def test_missing_clients_are_named_and_enough_others_start(places: list[Place]) -> None:
    wire = Wire(places)
    del wire.transport.here["node-bern"]
    with pytest.raises(ClientError, match="client bern: it did not connect within"):
        wire.federation.members()
    wire.federation.leave(["bern"])
    assert [m.client for m in wire.federation.members()] == ["graz", "ulm"]
    alone = Wire(places)
    alone.transport.here = {"node-ulm": places[0].answer}
    with pytest.raises(
        TrainingError, match=r"1 clients connected .* 2 are needed \(client bern: it did not .*; client graz"
    ):
        alone.federation.members()


def test_a_client_that_refuses_is_not_waited_for(tmp_path: Path) -> None:
    places = [Place(tmp_path, "ulm", max_rank=4), Place(tmp_path, "bern"), Place(tmp_path, "graz")]
    wire = Wire(places)
    began = wire.transport.clock()
    with pytest.raises(ClientError, match="client ulm: its policy refuses rank 8"):
        wire.federation.members()
    assert wire.transport.clock() - began < WAITING.start_s / 2
    wire.federation.leave(["ulm"])
    assert [m.client for m in wire.federation.members()] == ["bern", "graz"]


def test_before_the_rounds_a_lost_message_is_sent_again(places: list[Place]) -> None:
    wire = Wire(places)
    wire.federation.members()
    receive = wire.transport.receive
    lost: list[Any] = []

    def losing(timeout_s: float) -> Any:
        arrived = receive(timeout_s)
        if arrived is not None and arrived.node == "node-ulm" and not lost:
            lost.append(arrived)
            return replace(arrived, body=b"", error="Node Unavailable")
        return arrived

    wire.transport.receive = losing  # type: ignore[method-assign]
    found = group(wire.federation, CONFIG, adapter(0), DIM)
    assert [a.client for a in found.assignments] == sorted(NAMES)
    assert wire.said("client ulm: asked again after Node Unavailable")


def test_a_late_client_is_reported_and_the_run_continues(places: list[Place]) -> None:
    wire = Wire(places)
    del wire.transport.here["node-bern"]
    with pytest.raises(ClientError, match="client bern: it did not connect within"):
        wire.federation.members()
    wire.federation.leave(["bern"])
    joined(wire)
    wire.transport.here["node-bern"] = places[1].answer
    for number in range(2):
        answers = by_client(wire.federation.train([request(name, number) for name in ("ulm", "graz")]))
        assert all(isinstance(answer, TrainReply) for answer in answers.values())
    assert wire.said("client bern is too late for this run; add it to the bundle with fedrouter join")


def test_a_client_that_leaves_for_good_is_left_out_of_every_round(places: list[Place]) -> None:
    wire = Wire(places)
    assignments = joined(wire)
    del wire.transport.here["node-bern"]
    rounds = list(run_rounds(wire.federation, assignments, fresh_state([adapter(0)] * 2), CONFIG))
    assert len(rounds) == CONFIG.train.rounds
    for result in rounds:
        refused = {client: why for c in result.clusters for client, why in c.refused.items()}
        assert refused == {"bern": "it was not connected"}


def test_too_few_updates_stop_the_run(places: list[Place]) -> None:
    wire = Wire(places, replace(WAITING, least_replies=3))
    joined(wire)
    wire.transport.here["node-graz"] = None
    with pytest.raises(TrainingError, match=r"2 clients sent an update, but 3 are needed \(client graz"):
        list(wire.federation.train([request(name) for name in NAMES]))


@pytest.mark.parametrize(
    ("policy", "changes", "why"),
    [
        ({"methods": ["fedavg"]}, {}, "its policy refuses method fedrouter (here: fedavg)"),
        ({"max_rank": 4}, {}, "its policy refuses rank 8 (at most 4 here)"),
        ({"min_cluster_size": 9}, {}, "its policy refuses privacy.min_cluster_size 5 (at least 9 here)"),
        ({"update_noise": 0.5}, {}, "its policy refuses privacy.update_noise 0.0"),
        ({"secure_sum": True}, {}, "updates that are not summed"),
        ({}, {"embedder": {"kind": "endpoint", "model": "m", "url": "http://x:1"}}, "an embeddings endpoint"),
        ({}, {"method": "no such"}, "not valid in this version"),
    ],
)
def test_a_plan_outside_the_policy_is_refused_before_rows_are_read(
    tmp_path: Path, policy: dict[str, Any], changes: dict[str, Any], why: str
) -> None:
    place = Place(tmp_path, "ulm", **policy)
    place.opened = lambda *_: pytest.fail("rows were read")  # type: ignore[method-assign]
    place.start()
    wire = Wire([place], plan=hello(**changes))
    with pytest.raises(TrainingError):
        wire.federation.members()
    assert wire.said(why)


def test_a_request_outside_the_policy_is_refused(tmp_path: Path) -> None:
    places = [Place(tmp_path, "ulm", max_steps=10), Place(tmp_path, "bern")]
    wire = Wire(places)
    joined(wire)
    answers = by_client(wire.federation.train([request(name, steps=11) for name in ("ulm", "bern")]))
    assert answers["ulm"] == TrainFailure("ulm", 0, "its policy refuses 11 steps (at most 10 here)")
    assert isinstance(answers["bern"], TrainReply)


def test_the_operator_is_told_of_a_refusal_once_and_its_reason_is_recorded(tmp_path: Path) -> None:
    places = [Place(tmp_path, "ulm", max_steps=10), Place(tmp_path, "bern")]
    wire = Wire(places)
    joined(wire)
    for number in range(2):
        list(wire.federation.train([request(name, number, steps=11) for name in ("ulm", "bern")]))
    refusal = "its policy refuses 11 steps (at most 10 here)"
    assert places[0].said.getvalue().count(f"client ulm: refused: {refusal}\n") == 1
    lines = [json.loads(line) for line in places[0].site.audit.read_text().splitlines()]
    assert [line["reason"] for line in lines if "Refused" in line["kinds"]] == [refusal] * 2
    assert "refused" not in places[1].said.getvalue()
    assert "reason" not in places[1].site.audit.read_text()


def test_the_operator_is_told_of_a_refused_plan(tmp_path: Path) -> None:
    place = Place(tmp_path, "ulm", max_rank=4)
    with pytest.raises(TrainingError):
        Wire([place]).federation.members()
    assert place.said.getvalue() == "client ulm: refused: its policy refuses rank 8 (at most 4 here)\n"


def test_one_step_is_no_steps(places: list[Place]) -> None:
    wire = Wire(places)
    joined(wire)
    list(wire.federation.train([request("ulm", steps=1)]))
    assert places[0].said.getvalue().endswith("round 1: trains task cluster 0, 1 step\n")


def test_daily_limits_survive_restarts(tmp_path: Path) -> None:
    place = Place(tmp_path, "ulm", max_requests_per_day=3)
    bodies = [seal(Envelope("run", "ulm", n, (Summarise(None),))) for n in range(1, 6)]
    kinds = []
    from fedrouter.train.wire.keys import claimed
    from fedrouter.train.wire.messages import REPLIES

    for body in bodies:
        place.start()
        (reply,) = unseal(claimed(place.answer(body))[2], REPLIES, 1 << 20).messages
        kinds.append(type(reply).__name__)
    assert kinds == ["Behind"] * 3 + ["Refused"] * 2
    lines = [json.loads(line) for line in place.site.audit.read_text().splitlines()]
    assert len(lines) == 10
    assert {line["way"] for line in lines} == {"in", "out"}
    assert all(line["bytes"] and len(line["sha256"]) == 64 for line in lines)


def test_a_different_base_or_embedder_is_refused(places: list[Place]) -> None:
    places[0].opened = lambda *_: (LocalFederation([], Trainer()), "another", PROBE)  # type: ignore[method-assign,arg-type]
    places[1].opened = lambda *_: (LocalFederation([], Trainer()), "base", 2 * PROBE)  # type: ignore[method-assign,arg-type]
    for place in places[:2]:
        place.start()
    wire = Wire(places)
    with pytest.raises(TrainingError, match="1 clients connected"):
        wire.federation.members()
    assert wire.said("client ulm: its base does not match the server's")
    assert wire.said("client bern: its embedder does not match the server's: vectors differ by 100.0%")


def test_secure_rounds_equal_plain_rounds_and_a_single_update_is_refused(tmp_path: Path) -> None:
    names = ("ulm", "bern", "graz")
    plain, summed = ([Place(tmp_path / kind, name) for name in names] for kind in ("plain", "summed"))
    ends = []
    for places, secure in ((plain, False), (summed, True)):
        wire = Wire(places, plan=hello(secure))
        wire.federation.members()
        found = group(wire.federation, CONFIG, adapter(0), DIM)
        config = CONFIG.model_copy(update={"train": CONFIG.train.model_copy(update={"schedule": "all"})})
        rounds = list(run_rounds(wire.federation, found.assignments, found.state, config))
        assert [c.refused for r in rounds for c in r.clusters] == [{}] * sum(len(r.clusters) for r in rounds)
        ends.append(rounds[-1].state)
    for one, other in zip(*(state.adapters for state in ends), strict=True):
        assert max(np.abs(one[name] - other[name]).max() for name in one) < 1e-6
    (alone,) = (a for a in wire.federation._replies([request("ulm")], TrainReply))
    assert alone == TrainFailure("ulm", 0, "the plan is to sum updates, but this requests a single one")
    kinds = [k for line in summed[0].site.audit.read_text().splitlines() for k in json.loads(line)["kinds"]]
    assert "TrainReply" not in kinds
    assert {"SumKey", "SumSealed", "Masked", "SumOpened"} <= set(kinds)


@pytest.mark.parametrize(
    "broken",
    [
        LocalClusters(np.ones(2), np.zeros((2, DIM - 1)), np.eye(DIM)),
        LocalClusters(np.array([np.nan, 1.0]), np.zeros((2, DIM)), np.eye(DIM)),
        LocalClusters(np.array([-5.0, 1.0]), np.zeros((2, DIM)), np.eye(DIM)),
        Assignment("ulm", ()),
    ],
)
def test_impossible_numbers_are_a_client_failure(places: list[Place], broken: Any) -> None:
    places[0].resident._handle = lambda *_: iter([broken])  # type: ignore[method-assign]
    wire = Wire(places[1:])
    wire.federation._roster = {place.name: place.key for place in places}
    wire.federation.members()
    wire.federation._names = sorted(NAMES)
    wire.federation._members["ulm"] = replace(wire.federation._members["bern"], client="ulm")
    wire.transport.here["node-ulm"] = places[0].answer
    wire.federation._nodes["ulm"] = "node-ulm"
    places[0].resident._federation, places[0].resident._run = wire.federation, "run"
    with pytest.raises(ClientError, match="client ulm: it"):
        list(wire.federation.summarise("auto"))

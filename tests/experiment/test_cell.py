"""Requests of a cell, and the means in its scores."""

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fedrouter.errors import ServingError
from fedrouter.evaluate import TaggedRecord
from fedrouter.evaluate.endpoint import Answer
from fedrouter.evaluate.scores import score
from fedrouter.experiment.cell import evaluations
from fedrouter.experiment.compose import mix_of, name_of, write_mixes
from fedrouter.experiment.engine import ROWS, Transformers, Vllm
from fedrouter.experiment.settings import World
from fedrouter.types import Decision, Record, TaskCluster, Turn

WORLD = World(tests=["x"], metric="exact_match")


def record(task: str, answer: str) -> TaggedRecord:
    return TaggedRecord(Record((Turn("user", task),), answer, task), "file")


def decision(model: str, distances: dict[str, float] | None = None) -> Decision:
    return Decision(model, "c", 1.0, 2.0, 1.0, False, distances or {})


def test_a_prompt_s_score_is_the_mean_over_those_who_ask_it() -> None:
    # Adapter "yes" answers yes to everything. Client a has only task t, b has both tasks.
    tests = [record("t", "yes"), record("t", "no"), record("u", "yes")]
    held: dict[str, set[str | None]] = {"a": {"t"}, "b": {"t", "u"}}
    everywhere = [decision("yes"), decision("no"), decision("yes")]
    chosen = {
        "global": {"a": everywhere, "b": everywhere},
        "local": {"a": [decision("no")] * 3, "b": [decision("yes"), decision("no"), decision("yes")]},
    }
    results = {(n, i): score(tests[i], Answer(n, n)) for n in ("yes", "no") for i in range(3)}
    found = evaluations(tests, held, chosen, results, WORLD)
    assert found["global/all"]["prompts"] == {"t": [1.0, 1.0], "u": [1.0]}
    # With routing "local", a's adapter answers no to everything, which is right for the second prompt.
    assert found["local/own"]["prompts"] == {"t": [0.5, 1.0], "u": [1.0]}, "u is asked by b alone"
    assert found["local/all"]["prompts"] == {"t": [0.5, 1.0], "u": [0.5]}
    assert found["local/all"]["tasks"]["t"]["exact_match"] == 0.75
    assert found["global/own"] == {"same as": "global/all"}


def clusters(*names: str) -> Any:
    return SimpleNamespace(clusters=[TaskCluster(n, f"{n}-1", 1, (), {}, 1.0) for n in names])


@pytest.mark.parametrize(
    ("distances", "want"),
    [
        ({"a": 1.0, "b": 1.0, "c": 9.0}, (("a-1", 2), ("b-1", 2))),
        ({"b": 1.0, "a": 2.0}, (("b-1", 3), ("a-1", 1))),
        ({"a": 1.0, "b": 50.0}, (("a-1", 4),)),
        ({"a": 0.0, "b": 1.0}, (("a-1", 4),)),
        ({"a": 3.0}, (("a-1", 4),)),
    ],
)
def test_the_two_nearest_are_merged_by_how_near_they_are(
    distances: dict[str, float], want: tuple[tuple[str, int], ...]
) -> None:
    assert mix_of(clusters("a", "b", "c"), decision("a-1", distances)) == want


def test_a_merge_computes_the_weighted_sum_of_products(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    shapes = {"m.lora_A.weight": (2, 5), "m.lora_B.weight": (3, 2)}
    states = {
        n: {k: draw.normal(size=s).astype(np.float32) for k, s in shapes.items()} for n in ("a-1", "b-1")
    }
    paths = {name: tmp_path / "adapters" / name for name in states}
    for name, state in states.items():
        directory = paths[name]
        directory.mkdir(parents=True)
        save_file(state, directory / "adapter_model.safetensors")
        (directory / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 4}')
    for mix in ((("a-1", 3), ("b-1", 1)), (("a-1", 4),)):
        bundle: Any = SimpleNamespace(adapter_paths=paths)
        written = write_mixes(bundle, {name_of(mix): mix}, tmp_path / "mixes")
        (path,) = written.values()
        merged = load_file(path / "adapter_model.safetensors")
        want = sum(w / 4 * states[n]["m.lora_B.weight"] @ states[n]["m.lora_A.weight"] for n, w in mix)
        np.testing.assert_allclose(merged["m.lora_B.weight"] @ merged["m.lora_A.weight"], want, rtol=1e-5)
        assert '"r": 4' in (path / "adapter_config.json").read_text()


def test_prompts_lie_in_blocks_of_one_adapter_and_bounded_batches() -> None:
    engine = Transformers.__new__(Transformers)
    engine._tokens = 3 * ROWS * 30
    draw = np.random.default_rng(0)
    adapters = draw.integers(0, 3, 150).tolist()
    prompts = [[0] * int(n) for n in draw.integers(1, 20, 150)]
    batches = engine._batches(adapters, prompts, max_tokens=10)
    seen = [i for batch in batches for _, block in batch for i in block]
    assert sorted(seen) == list(range(150))
    for batch in batches:
        longest = max(len(prompts[i]) for _, block in batch for i in block) + 10
        assert len(batch) * ROWS * longest <= engine._tokens or len(batch) == 1
        for adapter, block in batch:
            assert len(block) <= ROWS
            assert {adapters[i] for i in block} == {adapter}


class Echo(BaseHTTPRequestHandler):
    """An OpenAI endpoint that answers with the model and the prompt; it has no adapter "gone"."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        known = asked["model"] != "gone"
        message = {"role": "assistant", "content": f"{asked['model']}: {asked['messages'][0]['content']}"}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        answer = {
            "id": "1",
            "object": "chat.completion",
            "created": 0,
            "model": asked["model"],
            "choices": [choice],
        }
        body = json.dumps(answer if known else {"error": {"message": "no such model"}}).encode()
        self.send_response(200 if known else 404)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Log nothing."""


@pytest.fixture
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_vllm_is_asked_by_adapter_and_answers_in_order(url: str) -> None:
    asked = [("a" if i % 2 else "base", (Turn("user", str(i)),)) for i in range(40)]
    found = Vllm(url).answers({"a": Path("a")}, asked, max_tokens=3)
    assert found == [f"{name}: {turns[0].content}" for name, turns in asked]
    with pytest.raises(ServingError, match=r"gone did not answer.*no such model"):
        Vllm(url).answers({"gone": Path("gone")}, [("gone", (Turn("user", "x"),))], max_tokens=3)

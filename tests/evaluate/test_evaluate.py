import io
import json
import threading
from pathlib import Path
from typing import Any

import pytest
from fake_server import FakeServer
from rich.console import Console

import fedrouter.evaluate.endpoint
from fedrouter.cli import _fields
from fedrouter.errors import ConfigError, DataError, ServingError
from fedrouter.evaluate import TaggedRecord, evaluate, load, render, write_json, write_records
from fedrouter.evaluate.report import Report
from fedrouter.types import Record, Turn


def tagged(prompt: str, expected: str, task: str | None, client: str = "north") -> TaggedRecord:
    return TaggedRecord(Record((Turn("user", prompt),), expected, task), client)


RECORDS = [
    tagged("Is it?", "Yes", "yes-no"),
    tagged("Was it?", "No", "yes-no"),
    tagged("hello you", "HELLO YOU", "shout", client="south"),
    tagged("why?", "WHY?", "shout", client="south"),  # a question: routed to the wrong adapter
    tagged("far away", "FAR AWAY", "shout", client="south"),  # falls back
    tagged("good day", "GOOD DAY", "shout"),
]


def many(count: int) -> list[TaggedRecord]:
    return [tagged(f"word {number}", f"WORD {number}", "shout") for number in range(count)]


def test_models_side_by_side(server: FakeServer) -> None:
    report = evaluate(server.url, RECORDS, ["fedrouter", "base", "oracle", "shout-2222"])
    fedrouter, base, oracle, shout = report.models
    assert [model.model for model in report.models] == ["fedrouter", "base", "oracle", "shout-2222"]
    assert {task: scores.rouge_1 for task, scores in fedrouter.by_task.items()} == {
        "shout": 0.5,
        "yes-no": 0.5,
    }
    assert {task: scores.exact_match for task, scores in oracle.by_task.items()} == {
        "shout": 1,
        "yes-no": 0.5,
    }
    assert (fedrouter.mean.rouge_1, oracle.mean.rouge_1) == (0.5, 0.75)
    assert (base.mean.rouge_1, shout.by_task["yes-no"].rouge_1) == (0, 0)
    assert fedrouter.overall.num_examples == 6
    assert set(fedrouter.by_client) == {"north", "south"}
    assert set(oracle.by_adapter) == {"yes-no-1111", "shout-2222"}
    assert report.ratios == {
        "fedrouter ÷ oracle": pytest.approx(0.5 / 0.75),
        "fedrouter ÷ shout-2222": pytest.approx(0.5 / 0.5),
    }
    assert report.num_failed == 0


def test_routing_is_compared_with_the_oracle(server: FakeServer) -> None:
    routing = evaluate(server.url, RECORDS).models[0].routing
    assert routing is not None
    assert routing.confusion == {
        "shout": {"base": 1, "shout-2222": 2, "yes-no-1111": 1},
        "yes-no": {"yes-no-1111": 2},
    }
    assert routing.accuracy == pytest.approx(4 / 6)
    assert routing.fallback_rate == pytest.approx(1 / 6)


def test_named_models_have_no_routing(server: FakeServer) -> None:
    assert evaluate(server.url, RECORDS, ["base"]).models[0].routing is None


@pytest.mark.parametrize("concurrency", [1, 4])
def test_concurrency_is_bounded_and_used(server: FakeServer, concurrency: int) -> None:
    server.delay_s = 0.02
    server.meeting = threading.Barrier(concurrency, timeout=5)
    assert evaluate(server.url, many(12), concurrency=concurrency, retries=0).num_failed == 0
    assert server.most_at_once == concurrency
    assert len(server.asked()) == 12
    assert set(server.asked().values()) == {1}


def test_latency_and_tokens_per_second(server: FakeServer) -> None:
    server.delay_s = 0.05
    model = evaluate(server.url, many(8), concurrency=4).models[0]
    assert model.latency_p50_s is not None and model.latency_p95_s is not None
    assert 0.05 <= model.latency_p50_s <= model.latency_p95_s <= model.seconds
    assert model.tokens_per_s == pytest.approx(8 * 5 / model.seconds)
    assert model.seconds >= 0.1  # two rounds of four


def test_failed_records_count_as_zero_and_are_listed(server: FakeServer) -> None:
    server.failing = {"word 2": [500] * 9, "word 3": [400]}
    report = evaluate(server.url, many(4), retries=1)
    model = report.models[0]
    assert report.num_failed == 2
    assert (model.mean.rouge_1, model.mean.num_failed) == (0.5, 2)
    assert [result.answer.error is None for result in model.results] == [True, True, False, False]
    assert "record 3: " in text_of(report)


def test_a_server_that_goes_away_ends_the_run(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fedrouter.evaluate.run, "GIVE_UP_AFTER", 6)
    server.dead_after = 10
    with pytest.raises(ServingError, match=r"lost the connection to .* after \d+ of 500 records"):
        evaluate(server.url, many(500), retries=0, concurrency=4)
    assert len(server.chats) < 30


def test_oracle_needs_an_adapter_for_every_task(server: FakeServer) -> None:
    with pytest.raises(DataError, match=r"record 2 \(client north\) has task 'poem'.*trained: shout, yes-no"):
        evaluate(server.url, [RECORDS[0], tagged("a", "b", "poem")], ["oracle"])
    with pytest.raises(DataError, match="has task None"):
        evaluate(server.url, [tagged("a", "b", None)], ["oracle"])
    assert not server.asked()


def test_oracle_needs_fedrouter_serve(server: FakeServer) -> None:
    server.clusters = None
    with pytest.raises(ServingError, match="does not list its task clusters"):
        evaluate(server.url, RECORDS, ["oracle"])
    routing = evaluate(server.url, RECORDS).models[0].routing
    assert routing is not None and routing.accuracy is None


def test_oracle_refuses_an_adapter_that_is_not_served(server: FakeServer) -> None:
    server.clusters = {"clusters": [{"adapter": "gone", "task_counts": {"yes-no": 1, "shout": 1}}]}
    with pytest.raises(ServingError, match="serves no model 'gone'"):
        evaluate(server.url, RECORDS, ["oracle"])


def test_limit_per_task_draws_the_same_records_for_a_seed(server: FakeServer) -> None:
    def asked(seed: int) -> list[str]:
        server.chats.clear()
        report = evaluate(server.url, [*many(30), *RECORDS], limit_per_task=2, seed=seed)
        assert {task: scores.num_examples for task, scores in report.models[0].by_task.items()} == {
            "shout": 2,
            "yes-no": 2,
        }
        return sorted(server.asked())

    assert asked(1) == asked(1)
    assert len({tuple(asked(seed)) for seed in range(4)}) > 1


@pytest.mark.parametrize(
    "options",
    [{"models": []}, {"concurrency": 0}, {"max_tokens": 0}, {"limit_per_task": 0}, {"timeout_s": 0}],
)
def test_settings_out_of_range(server: FakeServer, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        evaluate(server.url, RECORDS, **options)


def test_no_records(server: FakeServer) -> None:
    with pytest.raises(DataError, match="no records"):
        evaluate(server.url, [], limit_per_task=3)


def test_load_names_clients_after_files(tmp_path: Path) -> None:
    rows = '{"prompt": "a", "completion": "b", "task": "t"}\n'
    for name in ("north/test.jsonl", "south/test.jsonl", "west.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(rows)
    north, south, west = (
        str(tmp_path / name) for name in ("north/test.jsonl", "south/test.jsonl", "west.jsonl")
    )
    assert [(example.client, example.task) for example in load([north, west])] == [
        ("test", "t"),
        ("west", "t"),
    ]
    assert [example.client for example in load([north, south])] == [north, south]


def test_load_reads_fields_by_the_names_that_files_give_them(tmp_path: Path) -> None:
    file = tmp_path / "faq.jsonl"
    file.write_text('{"question": "why?", "answer": "so", "category": "faq"}\n')
    (one,) = load([str(file)], fields={"prompt": "question", "completion": "answer", "task": "category"})
    assert (one.record.turns[-1].content, one.record.completion, one.task) == ("why?", "so", "faq")


def test_messages_name_the_option_of_the_command(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "faq.jsonl"
    file.write_text('{"question": "why?", "answer": "so", "note": "n"}\n')
    fields = {"prompt": "question", "completion": "answer"}
    load([str(file)], fields=fields)
    assert caplog.messages == [
        f"{file}: unread fields: note (100 % of rows); map them with --field NAME",
    ]
    with pytest.raises(ConfigError, match="--field prmpt: not a field"):
        load([str(file)], fields={"prmpt": "question"})
    with pytest.raises(DataError, match="no row has the field topic, which --field task names"):
        load([str(file)], fields={**fields, "task": "topic"})
    with pytest.raises(ConfigError, match="--field: two entries"):
        _fields(["prompt=q", "prompt=prompt"])


def test_load_of_built_in_test_records() -> None:
    records = load(["builtin:four-tasks"], num_per_task=3, seed=1)
    assert len(records) == 12
    assert {example.client for example in records} == {"builtin:four-tasks"}
    assert len({example.task for example in records}) == 4


def text_of(report: Report, width: int = 120) -> str:
    out = io.StringIO()
    console = Console(file=out, width=width)
    console.print(render(report))
    return out.getvalue()


def test_render_shows_scores_ratios_routing_and_clients(server: FakeServer) -> None:
    shown = text_of(evaluate(server.url, RECORDS, ["fedrouter", "oracle"]))
    for part in (
        "mean ROUGE-1, fedrouter ÷ oracle = 0.667",
        "fedrouter sent 66.7% to the task's adapter, 16.7% to the fallback",
        "south",
        "yes-no-1111",
    ):
        assert part in shown


def test_progress_lines_when_piped(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fedrouter.evaluate.progress, "LINE_EVERY_S", 0.0)
    out = io.StringIO()
    console = Console(file=out, width=40)
    evaluate(server.url, RECORDS[:2], ["base"], console=console)
    lines = out.getvalue().splitlines()
    assert lines[:2] == ["base: 1/2", "base: 2/2"]
    assert lines[2].startswith("base: 2 records in ")


def test_progress_on_a_terminal(server: FakeServer) -> None:
    out = io.StringIO()
    console = Console(file=out, width=80, force_terminal=True)
    evaluate(server.url, RECORDS[:2], ["base"], console=console)
    assert "2/2" in out.getvalue()


def test_json_and_records(server: FakeServer, tmp_path: Path) -> None:
    server.failing = {"hello you": [400]}
    url = server.url.replace("http://", "http://me:password@")
    report = evaluate(url, RECORDS, ["fedrouter", "base"], limit_per_task=4)
    write_json(report, tmp_path / "new" / "report.json")
    write_records(report, tmp_path / "new" / "records.jsonl")

    content = (tmp_path / "new" / "report.json").read_text()
    saved = json.loads(content)
    assert "password" not in content
    assert saved["url"] == server.url
    assert saved["models"]["fedrouter"]["mean"]["num_examples"] == 6
    assert saved["models"]["fedrouter"]["routing"]["confusion"]["yes-no"] == {"yes-no-1111": 2}
    assert saved["settings"]["limit_per_task"] == 4
    assert set(saved["versions"]) == {"fedrouter", "python", "openai", "rouge_score"}
    assert saved["num_failed"] == 1
    assert saved["failures"][0]["record"] == 3

    lines = [json.loads(line) for line in (tmp_path / "new" / "records.jsonl").read_text().splitlines()]
    assert [line["record"] for line in lines] == [1, 2, 3, 4, 5, 6] * 2
    assert lines[0]["prompt"] == [{"role": "user", "content": "Is it?"}]
    assert (lines[0]["expected"], lines[0]["output"], lines[0]["adapter"]) == ("Yes", "Yes", "yes-no-1111")
    assert (lines[0]["distance"], lines[0]["rouge_1"], lines[0]["error"]) == (0.25, 1.0, None)
    assert "answered 400" in lines[2]["error"]


def test_a_report_that_cannot_be_written_leaves_nothing(server: FakeServer, tmp_path: Path) -> None:
    report = evaluate(server.url, RECORDS[:1], ["base"])
    (tmp_path / "taken").mkdir()
    with pytest.raises(ConfigError, match="cannot write"):
        write_json(report, tmp_path / "taken")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]

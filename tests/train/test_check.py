"""`fedrouter check`: its report, and that it fails where training would refuse."""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from fedrouter.cli import app
from fedrouter.config import Config, DataSettings, TrainSettings
from fedrouter.config_file import load_config
from fedrouter.errors import FedRouterError
from fedrouter.train.check import _histogram, check
from fedrouter.train.run import train
from fedrouter.train.show.check_view import as_text


@pytest.fixture
def config(tmp_path: Path) -> Path:
    rows = [{"prompt": f"Order {i} [lamp]", "completion": f"{i} lamps", "source": "web"} for i in range(12)]
    rows += [rows[0], {**rows[1], "completion": ""}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = "".join(f"Where is {i}?,There\n" for i in range(10))
    (tmp_path / "b.csv").write_text(f"question,answer\n{table}")
    (tmp_path / "c.toml").write_text(
        '[data]\nfields = { prompt = "question", completion = "answer" }\n[data.clients]\nb = "b.csv"\n'
    )
    (tmp_path / "ab.toml").write_text('[data.clients]\na = "a.jsonl"\n[train]\nmax_length = 16\n')
    return tmp_path


def test_the_report_describes_the_files(config: Path) -> None:
    clients = {"a": str(config / "a.jsonl")}
    report = check(Config(data=DataSettings(clients=clients), train=TrainSettings(epochs=2, batch_size=4)))
    (file,) = report.files
    assert (file["num_rows"], file["forms"], file["unread"]) == (
        14,
        {"prompt + completion": 14},
        {"source": 14},
    )
    (client,) = report.clients
    assert (client.num_rows, client.steps, len(client.rows)) == (14, 2 * 4, 3)
    assert [row.where for row in client.rows] == [f"{config}/a.jsonl:{n}" for n in (1, 7, 14)]
    assert client.rows[0].parts == (
        ("### Instruction:\nOrder 0 [lamp]\n\n### Response:\n", False),
        ("0 lamps</s>", True),
    )
    assert (report.num_duplicates, report.num_empty_answers, report.num_ambiguous) == (1, 1, 2)
    assert sum(number for _, _, number in report.histogram) == 14
    assert report.num_cut == 0 and report.needed["100%"] >= report.needed["95%"] > 0
    assert report.bytes_up == 4 * report.adapter_parameters > 0
    assert any("unread fields: source" in note for note in report.notes)


@pytest.mark.parametrize(
    "lengths", [[52] * 5 + [53] * 5, [7], range(5, 15), range(30), [1, 4000], [3, 17, 18]]
)
def test_the_bins_of_the_histogram_meet_without_overlap(lengths: Sequence[int]) -> None:
    bins = _histogram(lengths)
    assert len(bins) <= 10 and (bins[0][0], bins[-1][1]) == (min(lengths), max(lengths))
    assert all(low <= high for low, high, _ in bins)
    assert all(before[1] + 1 == after[0] for before, after in pairwise(bins))
    assert [n for _, _, n in bins] == [sum(a <= length <= b for length in lengths) for a, b, _ in bins]


def test_the_reported_adapter_size_is_right(config: Path) -> None:
    from fedrouter.models import load_base, load_tokenizer, resolve_base
    from fedrouter.train.client.sft import AdapterTrainer

    settings = Config(data=DataSettings(clients={"a": str(config / "a.jsonl")}))
    path = resolve_base("builtin:tiny")
    base = load_base(path, "float32", "cpu")
    number = sum(p.numel() for p in base.parameters())
    trainer = AdapterTrainer(base, load_tokenizer(path), settings.lora, settings.train, 0)
    report = check(settings)
    assert report.num_parameters == number
    assert report.adapter_parameters == sum(array.size for array in trainer.state().values())


def run(*arguments: str) -> tuple[int, str]:
    try:
        result = CliRunner().invoke(app, ["check", *arguments], catch_exceptions=False)
    except FedRouterError as error:  # which main prints as one line
        return 1, str(error)
    return result.exit_code, result.output


def test_the_command_marks_rows_and_reports_cut_ones(config: Path) -> None:
    code, out = run(str(config / "ab.toml"), "--set", "train.max_length=512")
    assert code == 0
    assert "lamp]\n\n### Response:\n⟦0 lamps</s>⟧" in out, "markup in rows is not interpreted"
    code, out = run(str(config / "ab.toml"))
    assert "longer than train.max_length = 16 tokens: 14 of 14 rows" in out
    assert "1 row repeated: prompt and answer" in out and "data.ignore" in out
    code, out = run(str(config / "c.toml"), "--json")
    report = json.loads(out)
    assert (
        code == 0 and report["ok"] and report["clients"][0]["rows"][0]["where"] == f"{config}/b.csv:2 (row 1)"
    )


def test_it_fails_where_train_would_refuse(config: Path) -> None:
    code, out = run(str(config / "ab.toml"), "--set", 'data.fields.prompt="question"')
    assert code == 1 and "a.jsonl:1: missing fields" in out
    code, out = run(str(config / "ab.toml"), "--json", "--set", 'lora.target_modules=["embed_tokens"]')
    assert code == 1 and json.loads(out)["ok"] is False and "embed_tokens" in json.loads(out)["error"]
    code, out = run(str(config / "ab.toml"), "--json", "--set", "lora.rank=600")
    assert code == 1 and "512" in json.loads(out)["error"]


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (
            ["privacy.min_cluster_size=100"],
            "client client-0: 10 rows in data.source; with privacy.min_cluster",
        ),
        (["data.max_per_client=2"], "client client-0: 2 rows in data.source; .* it needs at least 5"),
        (
            ["method='oracle'"],
            r"method oracle needs a task label in every row; missing in 10 of 10, first in .*",
        ),
        (["routing.probes='missing.jsonl'"], "missing.jsonl: No such file"),
        (["routing.probes='rows.jsonl'"], "rows.jsonl, line 1: "),
        (
            ["embedder.cache='rows.jsonl/cache'"],
            "embedder.cache rows.jsonl/cache: cannot be written: Not a dir",
        ),
        (
            ["cluster={method='kmeans', local=50, global=2}"],
            "client client-0: 50 local clusters but only 10 r",
        ),
        (["cluster.local=500"], "client client-0: 500 local clusters but only 10 rows"),
        (["cluster.global=5"], "5 task clusters but at most 4 groups of rows; lower cluster.global"),
        (["method='clustered'", "cluster.global=3"], "3 groups but only 2 clients; lower cluster.global"),
    ],
)
def test_check_and_train_refuse_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text(
        "".join(json.dumps({"prompt": f"Order {i}", "completion": "lamp"}) + "\n" for i in range(20))
    )
    Path("c.toml").write_text('[data]\nsource = "rows.jsonl"\npartition = "iid"\nnum_clients = 2\n')
    config = load_config(Path("c.toml"), overrides)
    with pytest.raises(FedRouterError, match=reason):
        check(config)
    with pytest.raises(FedRouterError, match=reason):
        train(config, Path("run"), Console(quiet=True))
    assert not Path("run").exists()


def test_loss_is_coloured_on_a_terminal(config: Path) -> None:
    report = check(Config(data=DataSettings(clients={"a": str(config / "a.jsonl")})))
    text = as_text(report.clients[0].rows[0], colours=True)
    assert [str(span.style) for span in text.spans] == ["dim", "green"]
    assert "⟦" not in text.plain

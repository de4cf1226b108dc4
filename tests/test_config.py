from pathlib import Path

import pytest

from fedrouter.config import Config
from fedrouter.config_file import load_config
from fedrouter.errors import ConfigError


def test_the_default_is_the_built_in_federation() -> None:
    config = load_config(None)
    assert (config.base.model, config.data.source, config.data.partition) == (
        "builtin:tiny",
        "builtin:four-tasks",
        "dual",
    )
    assert (config.data.num_clients, config.cluster.global_) == (8, 4)


def test_file_then_overrides(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text("seed = 3\n[train]\nrounds = 4\nsteps = 5\n[cluster]\nglobal = 4\n")
    config = load_config(file, ["train.steps=6", "data.partition=single", "lora.target_modules=['q_proj']"])
    assert (config.seed, config.train.rounds, config.train.steps) == (3, 4, 6)
    assert (config.cluster.global_, config.data.partition, config.lora.target_modules) == (
        4,
        "single",
        ["q_proj"],
    )


def test_relative_paths_belong_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{}")
    file = tmp_path / "c.toml"
    file.write_text(
        '[base]\nmodel = "org/model"\n[data]\nclients = { north = "a.jsonl", south = "org/set" }\n'
        '[embedder]\nkind = "endpoint"\nmodel = "a.jsonl"\nurl = "http://localhost"\n'
    )
    config = load_config(file)
    assert config.data.clients == {"north": str(tmp_path / "a.jsonl"), "south": "org/set"}
    assert config.base.model == "org/model", "a hub id stays a hub id"
    assert config.embedder.model == "a.jsonl", "an endpoint has names of its own"


def test_other_paths_of_a_file_belong_to_it_too(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text("x")
    (tmp_path / "alpaca").mkdir()
    file = tmp_path / "c.toml"
    file.write_text(
        '[base]\nchat_template = "t.jinja"\n[embedder]\ncache = "vectors"\n', encoding="utf-8-sig"
    )
    config = load_config(file)
    assert config.base.chat_template == str(tmp_path / "t.jinja")
    assert config.embedder.cache == str(tmp_path / "vectors"), "it is made there"
    file.write_text('[base]\nchat_template = "alpaca"\n')
    assert load_config(file).base.chat_template == "alpaca"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ("source = []", "data.source: expected a data set, or a list of data sets, found []"),
        ('source = ""', "data.source: expected a data set, or a list of data sets, found ''"),
        ('source = ["a.jsonl", " "]', "data.source: expected a data set, or a list of data sets, found ["),
        ("source = 3", "data.source: expected a data set, or a list of data sets, found 3"),
        ("[data.clients]", "data.clients is empty; give clients and their data"),
        ('clients = { a = "" }', "data.clients.a is empty; give the client a data set"),
    ],
)
def test_data_without_a_name_is_refused(tmp_path: Path, data: str, reason: str) -> None:
    file = tmp_path / "c.toml"
    file.write_text(f"[data]\n{data}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    assert str(caught.value).startswith(f"{file}: {reason}")


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("train.stepz=1", "unknown key train.stepz; did you mean steps?"),
        ("trian.steps=1", "unknown key trian; did you mean train?"),
        ("train.steps=0", "train.steps: Input should be greater than or equal to 1 (got 0)"),
        ("cluster.local=0", "cluster.local"),
        ("data.partition=triple", "data.partition: Input should be 'single'"),
        ("embedder.kind=sentence-transformers", "embedder.model is needed for all embedder.kind but"),
        ("embedder={kind='endpoint', model='m'}", "embedder.url is needed for embedder.kind endpoint"),
        ("embedder.url='http://localhost:8000'", "embedder.kind endpoint, and not allowed for others"),
        (
            "embedder={kind='endpoint', model='m', url='http://h', layer=3}",
            "embedder.layer is only for kinds",
        ),
        ("embedder={kind='endpoint', model='m', url='localhost:8000'}", "expected http://HOST:PORT"),
        ("embedder={kind='endpoint', model='m', url='http://ann:secret@h'}", "FEDROUTER_EMBEDDER_KEY"),
        ("train={epochs=2, steps=3}", "give either train.steps or train.epochs"),
        ("train.patience=2", "train.patience needs validation rows"),
        ("method=fedavg", "method fedavg does not use cluster.global; remove it"),
        ("method=clusterd", "method: Input should be"),
        ("cluster={warmup=2}", "method fedrouter does not use cluster.warmup"),
        ("aggregate.trim=0.1", "aggregate.trim is only for aggregate.robust trimmed"),
        ("aggregate={method='exact', robust='median'}", "aggregate.robust needs aggregate.method average"),
        (
            "aggregate={method='exact', server='adam'}",
            "aggregate.server needs aggregate.method average: it works on A and B separately",
        ),
        ("aggregate.server_learning_rate=1", "is only for aggregate.server; remove it"),
        ("train.steps", "expected section.key=value"),
        ("seed.x=1", "seed"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(override: str, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, [override])
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["method=local", "aggregate.method=exact"], "method local does not aggregate"),
        (["method=fedprox"], "needs train.proximal above 0"),
        (["aggregate.robust=median"], 'set train.schedule to "all"'),
        (
            ["method=fedavg", "train.proximal=0.1"],
            "does not use train.proximal; remove it, or use method fedprox",
        ),
        (["method=clustered", "train.participation=0.5"], "needs every client in its warm-up"),
        (["method=clustered", "cluster.warmup=10"], "needs every client in its warm-up"),
        (["method=local", "routing.fallback=generalist"], "method local has no generalist"),
    ],
)
def test_options_that_do_not_belong_to_the_method_are_refused(overrides: list[str], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        load_config(None, ["cluster={}", *overrides])


@pytest.mark.parametrize("method", ["fedavg", "local", "clustered", "feddpa", "oracle"])
def test_every_method_runs_on_the_built_in_federation_with_a_few_settings(method: str) -> None:
    changes = [f"method={method}", "cluster={}"]
    assert load_config(None, changes).method == method


def test_a_file_that_does_not_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("= 3")
    with pytest.raises(ConfigError, match=r"bad\.toml"):
        load_config(tmp_path / "bad.toml")


def test_one_origin_of_data(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('[data]\npartition = "iid"\nclients = { a = "a.jsonl" }\n')
    with pytest.raises(ConfigError, match=r"remove data\.partition"):
        load_config(file)


@pytest.mark.parametrize("name", ["", "no\nrth", "n" * 201])
def test_a_client_has_a_name_that_the_bundle_can_hold(name: str) -> None:
    with pytest.raises(ConfigError, match=r"data.clients: .*: expected a printable name on one line"):
        load_config(None, ["data={}"], clients=[name])


def test_epochs_stand_in_for_steps() -> None:
    config = load_config(None, ["train={epochs=2}"])
    assert (config.train.epochs, config.train.steps) == (2, None)
    assert Config.model_validate(config.model_dump(by_alias=True)) == config


def test_every_setting_of_the_defaults_survives_the_resolved_file() -> None:
    resolved = load_config(None).model_dump(by_alias=True)
    assert Config.model_validate(resolved) == load_config(None)

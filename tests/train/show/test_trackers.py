import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fakes import adapter
from rich.console import Console

from fedrouter.config import Config
from fedrouter.errors import ConfigError, TrainingError
from fedrouter.train.show.trackers import Trackers, check_trackers
from fedrouter.train.state import ClusterRound, RoundResult, fresh_state


def result(number: int) -> RoundResult:
    state = fresh_state([adapter(0)] * 2)
    clusters = (
        ClusterRound(0, 2.0 - number, 80, 3, 0.5, 1.5, 0.01, {}, validation=1.0),
        ClusterRound(1, None, 0, 0, 0.0, 0.0, None, {"a": "it did not answer"}),
    )
    return RoundResult(
        type(state)(number + 1, state.adapters, state.moments, state.losses, state.best), clusters
    )


def config(*names: str) -> Config:
    return Config.model_validate({"seed": 7, "train": {"report_to": list(names)}})


def test_tensorboard_gets_the_metrics_of_every_task_cluster(tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with Trackers(config("tensorboard"), tmp_path, Console(quiet=True)) as trackers:
        for number in range(3):
            trackers.write(result(number), ["headline", "dialogue"])
    found = events.EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    loss = found.Scalars("train/headline/loss")
    assert [(s.step, s.value) for s in loss] == [(1, 2.0), (2, 1.0), (3, 0.0)]
    names = {"loss", "num_examples", "num_clients", "drift", "norm", "validation", "residual"}
    tags = found.Tags()["scalars"]
    assert {t for t in tags if t.startswith("train/headline/")} == {f"train/headline/{n}" for n in names}
    assert "train/dialogue/loss" not in tags
    assert "train/dialogue/num_clients" in tags
    assert b'"seed": 7' in found.Tensors("args/text_summary")[0].tensor_proto.string_val[0]


def eventually(holds: Callable[[], bool]) -> None:
    """Wait up to ten seconds, because trackers write in the background."""
    until = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < until, "not true within ten seconds"
        time.sleep(0.05)


@pytest.mark.skipif(not importlib.util.find_spec("wandb"), reason="wandb is not installed")
def test_wandb_gets_the_metrics_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    with Trackers(config("wandb"), tmp_path, Console(quiet=True)) as trackers:
        for number in range(3):
            trackers.write(result(number), ["headline", "dialogue"])
    assert wandb.run is not None
    assert wandb.run.config["seed"] == 7
    summary = dict(wandb.run.summary)
    assert (summary["train/headline/loss"], summary["train/global_step"]) == (0.0, 3)
    assert "train/dialogue/loss" not in summary
    wandb.finish()
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    eventually(lambda: file.read_bytes().count(b"train/headline/loss") >= 3)  # one value per round


@pytest.mark.skipif(not importlib.util.find_spec("mlflow"), reason="mlflow is not installed")
def test_mlflow_gets_the_metrics_in_a_local_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", store := f"file://{tmp_path}/mlruns")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    with Trackers(config("mlflow"), tmp_path / "mine", Console(quiet=True)) as trackers:
        for number in range(3):
            trackers.write(result(number), ["headline", "dialogue"])
    client = mlflow.MlflowClient(store)
    (run,) = client.search_runs(["0"])
    assert (run.info.run_name, run.info.status, run.data.params["seed"]) == ("mine", "FINISHED", "7")

    def loss() -> Any:
        return client.get_metric_history(run.info.run_id, "headline/loss")

    eventually(lambda: [(m.step, m.value) for m in loss()] == [(1, 2.0), (2, 1.0), (3, 0.0)])
    assert "dialogue/loss" not in run.data.metrics


@pytest.mark.skipif(not importlib.util.find_spec("mlflow"), reason="mlflow is not installed")
@pytest.mark.parametrize(
    ("error", "status"), [(TrainingError("no memory left"), "FAILED"), (KeyboardInterrupt(), "KILLED")]
)
def test_mlflow_records_how_a_run_ended(
    error: BaseException, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", store := f"file://{tmp_path}/mlruns")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    with pytest.raises(type(error)), Trackers(config("mlflow"), tmp_path, Console(quiet=True)):
        raise error
    (run,) = mlflow.MlflowClient(store).search_runs(["0"])
    assert run.info.status == status


def test_without_trackers_nothing_happens(tmp_path: Path) -> None:
    with Trackers(config(), tmp_path, Console(quiet=True)) as trackers:
        trackers.write(result(0), ["a", "b"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_tracker_gives_a_one_line_error(name: str) -> None:
    if importlib.util.find_spec(name):
        pytest.skip(f"{name} is installed")
    with pytest.raises(ConfigError, match=f"train.report_to {name}: not installed here; pip install {name}"):
        check_trackers([name])


def test_a_tracker_that_cannot_start_ends_the_run_before_it_begins(tmp_path: Path) -> None:
    if importlib.util.find_spec("wandb"):
        pytest.skip("wandb is installed")
    trackers = Trackers(config("wandb"), tmp_path, Console(quiet=True))
    with pytest.raises(TrainingError, match=r"train\.report_to wandb: "), trackers:
        pass


def test_an_unknown_tracker_is_refused() -> None:
    with pytest.raises(ValueError, match="tensorboard"):
        config("tensorbored")


class Failing:
    calls = 0

    def on_log(self, *_: object, **__: object) -> None:
        self.calls += 1
        raise ConnectionError("no route to host\nand more")


def test_a_tracker_that_fails_later_is_dropped(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    console = Console(record=True, width=200)
    with Trackers(config("tensorboard"), tmp_path, console) as trackers:
        failing = Failing()
        trackers._callbacks["elsewhere"] = failing
        for number in range(2):
            trackers.write(result(number), ["a", "b"])
    assert failing.calls == 1
    assert console.export_text() == "train.report_to elsewhere: left out from here on: no route to host\n"

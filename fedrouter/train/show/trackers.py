"""Log metrics to TensorBoard, W&B or MLflow, through the callbacks behind the Trainer's ``report_to``.

Each local training uses its own Trainer, and hundreds of logs of a few steps would be useless. So the
trackers log rounds instead: a step is a round, and a metric is one figure of one task cluster.
"""

import importlib.util
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Any

from rich.console import Console

from fedrouter.config import Config
from fedrouter.errors import ConfigError, TrainingError, first_line
from fedrouter.layout import print_line
from fedrouter.train.state import ClusterRound, RoundResult


def check_trackers(names: Sequence[str]) -> None:
    """Raise ConfigError if a tracker's package is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"train.report_to {name}: not installed here; pip install {name}")


def figures(c: ClusterRound) -> dict[str, float]:
    """Return the metrics of one task cluster in one round by name, without those that do not apply."""
    values = {
        "loss": c.loss,
        "num_examples": c.num_examples,
        "num_clients": c.num_clients,
        "drift": c.drift,
        "norm": c.norm,
        "validation": c.validation,
        "residual": c.residual,
    }
    return {name: value for name, value in values.items() if value is not None}


class Trackers:
    """The trackers named in ``train.report_to``; use as a context manager.

    A tracker that cannot start raises TrainingError. A tracker that fails later is dropped, and the run
    continues.
    """

    def __init__(self, config: Config, out: Path, console: Console):
        self._config, self._out, self._console = config, out, console
        self._callbacks: dict[str, Any] = {}

    def __enter__(self) -> "Trackers":
        names = list(self._config.train.report_to)
        if not names:
            return self
        from transformers import TrainerControl, TrainerState
        from transformers.integrations.integration_utils import get_reporting_integration_callbacks

        settings = _flat(self._config.model_dump(mode="json", by_alias=True))
        # Stands in for TrainingArguments: only the attributes that the callbacks read.
        self._arguments = SimpleNamespace(
            output_dir=str(self._out),
            run_name=self._out.name,
            to_dict=lambda: settings,
            to_json_string=lambda: json.dumps(settings, indent=2),
        )
        self._state, self._control = TrainerState(), TrainerControl()
        for name in names:
            try:
                (kind,) = get_reporting_integration_callbacks([name])
                self._callbacks[name] = callback = kind()
                if name == "tensorboard" and callback.logging_dir is None:
                    callback.logging_dir = str(self._out / "tensorboard")
                callback.on_train_begin(self._arguments, self._state, self._control)
            except Exception as error:
                raise TrainingError(f"train.report_to {name}: {first_line(error)}") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and "mlflow" in self._callbacks:  # its callback would report success
            with suppress(Exception):  # must not hide the run's own error
                importlib.import_module("mlflow").end_run(
                    "FAILED" if isinstance(error, Exception) else "KILLED"
                )
        self._call("on_train_end")

    def write(self, result: RoundResult, names: Sequence[str]) -> None:
        """Log one round."""
        if self._callbacks:
            self._state.global_step = result.number + 1
            clusters = [(names[c.cluster], figures(c)) for c in result.clusters]
            logs = {f"{cluster}/{name}": value for cluster, own in clusters for name, value in own.items()}
            self._call("on_log", logs=logs)

    def _call(self, event: str, **values: Any) -> None:
        for name, callback in list(self._callbacks.items()):
            try:
                getattr(callback, event)(self._arguments, self._state, self._control, **values)
            except Exception as error:  # a tracker that is down must not end a long run
                del self._callbacks[name]
                text = f"train.report_to {name}: left out from here on: {first_line(error)}"
                print_line(self._console, text)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat

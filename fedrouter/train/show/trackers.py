"""A run's metrics to TensorBoard, W&B or MLflow, through the callbacks behind the Trainer's ``report_to``.

Each client's training is a Trainer of its own, and hundreds of runs of a few steps say nothing. So they are
told of the rounds instead: one step is one server round, one metric is one figure of one task cluster.
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
from fedrouter.train.state import ClusterRound, RoundResult


def check_trackers(names: Sequence[str]) -> None:
    """Refuse a tracker whose package is not there, before anything is loaded.

    Raises
    ------
    ConfigError
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"train.report_to {name}: not installed here; pip install {name}")


def figures(c: ClusterRound) -> dict[str, float]:
    """Return what is measured of one task cluster in one round, by name; what does not apply is left out."""
    found = {
        "loss": c.loss,
        "num_examples": c.num_examples,
        "num_clients": c.num_clients,
        "drift": c.drift,
        "norm": c.norm,
        "validation": c.validation,
        "residual": c.residual,
    }
    return {name: value for name, value in found.items() if value is not None}


class Trackers:
    """The trackers that ``train.report_to`` names, told after every round; use it in ``with``.

    One that cannot start ends the run before it begins. One that fails later is left out from then on.
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
        # What the callbacks ask of TrainingArguments, with the run's own settings in it.
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
        if error is not None and "mlflow" in self._callbacks:  # whose callback would say that it finished
            with suppress(Exception):  # the run's own error is the one to be seen
                importlib.import_module("mlflow").end_run(
                    "FAILED" if isinstance(error, Exception) else "KILLED"
                )
        self._tell("on_train_end")

    def write(self, result: RoundResult, names: Sequence[str]) -> None:
        """Tell of one round."""
        if self._callbacks:
            self._state.global_step = result.number + 1
            clusters = [(names[c.cluster], figures(c)) for c in result.clusters]
            self._tell("on_log", logs={f"{of}/{name}": v for of, own in clusters for name, v in own.items()})

    def _tell(self, what: str, **values: Any) -> None:
        for name, callback in list(self._callbacks.items()):
            try:
                getattr(callback, what)(self._arguments, self._state, self._control, **values)
            except Exception as error:  # a tracker's server that is down must not cost a night's training
                del self._callbacks[name]
                text = f"train.report_to {name}: left out from here on: {first_line(error)}"
                self._console.print(text, highlight=False, soft_wrap=True, markup=False)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat

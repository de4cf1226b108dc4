"""The contents of a report: the run's files, and its bundle's routing of test data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedrouter.bundle import find_base, find_embedder, load_bundle
from fedrouter.errors import DataError
from fedrouter.evaluate import load
from fedrouter.evaluate.offline import RoutingReport, evaluate_routing, stated_quantile
from fedrouter.files import read_json
from fedrouter.inspect import look

NUM_BUILTIN = 100  # test prompts per task of built-in data


@dataclass(frozen=True, slots=True)
class Facts:
    """The contents of a report."""

    run: Mapping[str, Any]  # see ``inspect.look``
    bundle: Mapping[str, Any] | None  # None until the run is finished
    tsne: Mapping[str, Any] | None
    routing: RoutingReport | None  # None without test data
    data: Sequence[str]  # sources of the test data
    scores: Mapping[str, Any] | None  # content of eval.json, if there is one


def gather(
    run: Path, data: Sequence[str] | None, base: str | None = None, embedder_url: str | None = None
) -> Facts:
    """Read a run; route test data with its bundle.

    Parameters
    ----------
    data : test records with tasks; None: the test split of the built-in data that the run was trained on.

    Raises
    ------
    DataError
        If ``run`` is not a run, or the data cannot be used.
    """
    found = look(run)
    if "run" not in found:
        raise DataError(f"{run} is a bundle; give a run directory, which contains config.json")
    source = found["run"]["config"]["data"]["source"]
    if data is None:
        sources = [source] if isinstance(source, str) else list(source or [])
        data = [name for name in sources if name.startswith("builtin:")]
    routing = None
    if "bundle" in found and data:
        bundle = load_bundle(run / "bundle")
        embedder = find_embedder(bundle, find_base(bundle, base), embedder_url)
        records = load(data, num_per_task=NUM_BUILTIN)
        routing = evaluate_routing(bundle, embedder, records, stated_quantile(bundle.path))
    return Facts(
        run=found["run"],
        bundle=found.get("bundle"),
        tsne=_read(run / "tsne.json"),
        routing=routing,
        data=data,
        scores=_read(run / "eval.json"),
    )


def _read(file: Path) -> Any:
    return read_json(file) if file.is_file() else None

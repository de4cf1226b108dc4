"""Preview a run offline, without training or loading weights.

``train`` also starts with ``loaded``; ``check`` adds row samples, token lengths and cost estimates.
"""

import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from fedrouter.bundle import read_probes
from fedrouter.config import Config
from fedrouter.data import Read
from fedrouter.embed import chosen_spec
from fedrouter.errors import ConfigError, TrainingError
from fedrouter.files import check_directory
from fedrouter.layout import number_of
from fedrouter.models import base_spec, empty_model, load_config, load_tokenizer, quieten, resolve_base
from fedrouter.partition import check_labels
from fedrouter.train.client.cluster import MAX_LOCAL, num_local
from fedrouter.train.client.rows import Rendered, Tokeniser, TokenRow, load_rows, positions_of
from fedrouter.train.client.sources import read_clients
from fedrouter.train.machine import check_machine, device_and_dtype
from fedrouter.train.server.accountant import check_accountant
from fedrouter.train.server.discover import MAX_JOINED
from fedrouter.types import Record

NUM_SHOWN = 3  # rows per client
BARS = 10  # in the histogram of token lengths
ODD = {
    "duplicates": "repeated: prompt and answer equal those of an earlier row, and each counts",
    "empty": "with an empty answer, which teaches the model to say nothing",
    "ambiguous": "with a prompt to which other rows give another answer",
}
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
ROUND_PASSES = 3.0  # cost of a training step in forward passes: forward, backward, adapter gradients


@dataclass(frozen=True, slots=True)
class Loaded:
    """Data that has passed every check that needs no base model in memory."""

    records: dict[str, list[Record]]
    reads: list[Read]
    rendered: Rendered
    counts: Counter[str]  # number of rows by key of ``ODD``


@dataclass(frozen=True, slots=True)
class ShownRow:
    """One row as the model will see it."""

    where: str
    parts: tuple[tuple[str, bool], ...]  # consecutive pieces of text; True: the piece carries loss
    num_tokens: int


@dataclass(frozen=True, slots=True)
class ClientCheck:
    """One client's rows and training steps."""

    name: str
    num_rows: int
    steps: int  # per round, over all subsets of the client
    rows: tuple[ShownRow, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """What ``fedrouter check`` shows."""

    files: tuple[dict[str, Any], ...]  # source, num_rows, forms, unread fields
    clients: tuple[ClientCheck, ...]
    notes: tuple[str, ...]  # warnings about data and settings
    histogram: tuple[tuple[int, int, int], ...]  # from, to (tokens), rows
    needed: Mapping[str, int]  # limits in tokens at which 95, 99, 100 % of the rows would not be cut
    limit: int  # tokens per row
    num_cut: int
    num_duplicates: int
    num_empty_answers: int
    num_ambiguous: int
    num_parameters: int
    adapter_parameters: int
    memory_bytes: int  # estimate for one training process
    round_s: float  # estimate for one process
    bytes_down: int  # to a client, per round and subset
    bytes_up: int
    reveals: Mapping[str, int]  # message sent before the rounds → bytes per client, at most

    def to_json(self) -> dict[str, Any]:
        """Return the report as a JSON object."""
        return {"ok": True, **asdict(self)}


def loaded(config: Config, say: Callable[[str], None]) -> Loaded:
    """Read, render and tokenise all rows; report rows that are cut, partly hidden or odd.

    Raises
    ------
    FedRouterError
        If a setting, a file, a row or the base's tokenizer cannot be used.
    """
    check_settings(config)
    records, reads = read_clients(config, say)
    check_fit(config, records)
    path = resolve_base(config.base.model, config.base.revision)
    rendered = tokenised(config, path, records, say)
    counts = _counts(records)
    for kind, text in ODD.items():
        if counts[kind]:
            say(f"{number_of(counts[kind], 'row')} {text}")
    return Loaded(records, reads, rendered, counts)


def check_settings(config: Config) -> None:
    """Check what needs neither rows nor a model: packages, devices, the probes, the cache's directory.

    Raises
    ------
    FedRouterError
        If a run of ``config`` could not use one of them.
    """
    check_machine(config.base, config.train.report_to)
    check_accountant(config.privacy)
    if config.routing.probes is not None:
        read_probes(Path(config.routing.probes))
    if config.embedder.cache is not None:
        check_directory(Path(config.embedder.cache), "embedder.cache")


def check_fit(config: Config, records: Mapping[str, Sequence[Record]]) -> None:
    """Check the settings against the clients and the numbers and labels of their rows.

    Task discovery may still find fewer groups than ``cluster.global``: here, only their maximum is known.

    Raises
    ------
    ConfigError, DataError, TrainingError
        If a setting does not fit.
    """
    for name in config.lora.ranks:
        if name not in records:
            raise ConfigError(f"lora.ranks: no client is called {name}; the clients are {', '.join(records)}")
    if config.method == "oracle":
        for name, rows in records.items():
            check_labels(f"client {name}: method oracle", rows)
    num = 0 if config.cluster.global_ == "auto" else config.cluster.global_
    if config.method == "clustered" and num > len(records):
        raise TrainingError(f"{num} groups but only {len(records)} clients; lower cluster.global")
    if config.method == "fedrouter":
        most = min(sum(_max_groups(config, name, len(rows)) for name, rows in records.items()), MAX_JOINED)
        if num > most:
            raise TrainingError(
                f"{num} task clusters but at most {most} groups of rows; lower cluster.global"
            )


def _max_groups(config: Config, client: str, num_rows: int) -> int:
    """Return the maximum number of groups of rows that a client reveals."""
    if config.privacy.centroid_noise:
        assert config.cluster.local != "auto", "the configuration refuses this"
        return config.cluster.local
    try:
        num = num_local(num_rows, config.cluster.local)
    except TrainingError as error:
        raise TrainingError(f"client {client}: {error}") from error
    return min(num, max(num_rows // config.privacy.min_cluster_size, 1))


def tokenised(
    config: Config, path: Path, records: Mapping[str, Sequence[Record]], say: Callable[[str], None]
) -> Rendered:
    """Render and tokenise all rows; report rows that are cut or that the chat template does not show.

    Raises
    ------
    DataError, ModelError
        If a row cannot be rendered, or the base has no usable tokenizer.
    """
    quieten()
    tokenizer = load_tokenizer(path, config.base.chat_template, config.base.date, say)
    positions = positions_of(load_config(path))
    tokeniser = Tokeniser(tokenizer, config.train.max_length, positions, config.train.loss == "last")
    load_rows(tokeniser, records)
    for line in tokeniser.lines():
        say(line)
    return Rendered(path, tokenizer, tokeniser)


def check(config: Config) -> Report:
    """Return what a run of ``config`` would do.

    Raises
    ------
    FedRouterError
        If ``train`` would refuse to start.
    """
    notes: list[str] = []
    found = loaded(config, notes.append)
    statistics = found.rendered.tokeniser.statistics
    sizes = _sizes(config, found.rendered.path)
    _, dtype = device_and_dtype(config.base)
    base = base_spec(config.base.model, config.base.revision, found.rendered.path)
    embedder, why = chosen_spec(config.embedder, base, found.rendered.path, dtype)
    if why:
        notes.append(why)
    steps = {name: _steps(config, len(rows)) for name, rows in found.records.items()}
    mean_length = float(np.mean(np.minimum(statistics.lengths, found.rendered.tokeniser.limit)))
    tokens = sum(steps.values()) * config.train.step_size * mean_length * config.train.participation
    num = sizes.num_parameters
    weights = num // 2 if config.base.quantization != "none" else num * BYTES[dtype]
    longest = max(statistics.lengths, default=0)
    batch_tokens = config.train.batch_size * min(longest, found.rendered.tokeniser.limit)
    return Report(
        files=tuple(_file(read) for read in found.reads),
        clients=tuple(
            ClientCheck(name, len(rows), steps[name], tuple(_shown(found, rows)))
            for name, rows in found.records.items()
        ),
        notes=tuple(notes),
        histogram=_histogram(statistics.lengths),
        needed={f"{share:.0%}": length for share, length in statistics.needed()},
        limit=found.rendered.tokeniser.limit,
        num_cut=statistics.num_cut,
        num_duplicates=found.counts["duplicates"],
        num_empty_answers=found.counts["empty"],
        num_ambiguous=found.counts["ambiguous"],
        num_parameters=num,
        adapter_parameters=sizes.num_adapter,
        memory_bytes=weights
        + 16 * sizes.num_adapter
        + batch_tokens * _activation_bytes(found.rendered.path, dtype),
        round_s=ROUND_PASSES * 2.0 * num * tokens / _flops(),
        bytes_down=4 * sizes.num_adapter,
        bytes_up=4 * sizes.num_adapter,
        reveals=_reveals(embedder.dim),
    )


def _file(read: Read) -> dict[str, Any]:
    reading = read.reading
    forms, unread = dict(reading.forms), dict(reading.unread)
    return {"source": read.source, "num_rows": len(read.records), "forms": forms, "unread": unread}


def _counts(records: Mapping[str, Sequence[Record]]) -> Counter[str]:
    """Count the rows of each kind in ``ODD``."""
    counts: Counter[str] = Counter()
    answers: dict[int, set[int]] = defaultdict(set)
    rows: Counter[tuple[int, int]] = Counter()
    for record in (record for client_records in records.values() for record in client_records):
        key = hash(repr((record.turns, record.tools))), hash(repr((record.completion, record.answer)))
        rows[key] += 1
        answers[key[0]].add(key[1])
        counts["empty"] += not record.completion.strip()
    counts["duplicates"] = sum(number - 1 for number in rows.values())
    counts["ambiguous"] = sum(number for (prompt, _), number in rows.items() if len(answers[prompt]) > 1)
    return counts


def _steps(config: Config, num_rows: int) -> int:
    """Return a client's optimizer steps per round; with epochs, treat its rows as a single subset."""
    if config.train.epochs is None:
        return config.train.steps or 0
    return config.train.epochs * math.ceil(num_rows * (1 - config.train.validation) / config.train.step_size)


def _shown(found: Loaded, records: Sequence[Record]) -> list[ShownRow]:
    picked = [records[i] for i in np.linspace(0, len(records) - 1, min(NUM_SHOWN, len(records))).astype(int)]
    return [
        ShownRow(record.where, _parts(found.rendered.tokenizer, row), len(row.ids))
        for record in picked
        for row in found.rendered.tokeniser.rows([record])[:1]
    ]


def _parts(tokenizer: Any, row: TokenRow) -> tuple[tuple[str, bool], ...]:
    """Split a row's text where loss begins or ends."""
    edges = [0, *(np.flatnonzero(np.diff(row.learned)) + 1).tolist(), len(row.ids)]
    return tuple(
        (str(tokenizer.decode(row.ids[a:b])), bool(row.learned[a])) for a, b in pairwise(edges) if a < b
    )


def _histogram(lengths: Sequence[int]) -> tuple[tuple[int, int, int], ...]:
    """Count the lengths in at most ``BARS`` bins of one width, each from its first to its last length."""
    low, high = min(lengths), max(lengths)
    width = math.ceil((high - low + 1) / BARS)
    counts = Counter((length - low) // width for length in lengths)
    starts = enumerate(range(low, high + 1, width))
    return tuple((start, min(start + width - 1, high), counts[number]) for number, start in starts)


@dataclass(frozen=True, slots=True)
class _Sizes:
    num_parameters: int  # of the base model
    num_adapter: int  # of one adapter


def _sizes(config: Config, path: Path) -> _Sizes:
    from fedrouter.train.client.targets import adapted, check_targets

    model = empty_model(path)
    check_targets(model, config.lora.target_modules)
    modules = adapted(model, config.lora.target_modules)
    adapter = sum(config.lora.rank * sum(shape) for shape in modules.values())
    num = sum(p.numel() for p in model.parameters())
    return _Sizes(num, adapter)


def _activation_bytes(path: Path, dtype: str) -> int:
    """Estimate the activation memory of one token: 34 numbers per layer and hidden unit, and the logits."""
    text = load_config(path).get_text_config()
    return int(34 * text.num_hidden_layers * text.hidden_size * BYTES[dtype] + 8 * text.vocab_size)


def _flops() -> float:
    """Measure this machine's floating-point operations per second, for a tenth of a second."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.ones(512, 512, device=device)
    x @ x
    began, num = time.perf_counter(), 0
    while time.perf_counter() - began < 0.1:
        x @ x
        num += 1
    if device == "cuda":
        torch.cuda.synchronize()
    return 2 * 512**3 * num / (time.perf_counter() - began)


def _reveals(dim: int) -> dict[str, int]:
    """Return the maximum size in bytes of each message sent before the rounds (see docs/privacy.md)."""
    groups = 4 * (MAX_LOCAL * (1 + dim) + dim * (dim + 1) // 2)  # the scatter is symmetric: half is sent
    return {"LocalClusters": groups, "Assignment (a task cluster)": 4 * 103}

"""Exact averaging compared with the dense mean of products: its error, and its cost as a share of a round.

The adapters come from one round of the built-in federation's clients, starting from one fresh adapter. A
second run cuts every second client's adapter to half the rank; a slice's mean is then over the adapters that
have it. Times are CPU seconds, so that a busy machine does not change the share.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import report
from rich.console import Console

from fedrouter.config_file import load_config
from fedrouter.train import run
from fedrouter.train.lora import average, cut
from fedrouter.train.server import loop as server
from fedrouter.train.server.aggregate import exact
from fedrouter.types import AdapterState, TrainReply

SETTINGS = ["data.num_clients=4", "data.num_per_task=60", "train.rounds=1", "train.steps=20"]


def main() -> None:
    """Measure and report."""
    groups: dict[int, list[TrainReply]] = {}
    collect = server.collect

    def recording(federation: Any, requests: Any, on_reply: Any) -> Any:
        began = time.process_time()
        replies = collect(federation, requests, on_reply)
        spent["round"] = time.process_time() - began
        for reply in replies.values():
            assert isinstance(reply, TrainReply), reply
            groups.setdefault(reply.cluster, []).append(reply)
        return replies

    spent: dict[str, float] = {}
    server.collect = recording
    with tempfile.TemporaryDirectory() as scratch:
        run.train(load_config(None, SETTINGS), Path(scratch) / "run", Console(quiet=True))
    rank = load_config(None).lora.rank
    errors: dict[str, list[float]] = {"average": [], "best of rank": [], "exact": []}
    residuals = []
    for name, method in (("average", average), ("exact", exact)):
        began = time.process_time()
        for group in groups.values():
            method([r.adapter for r in group], [r.num_examples for r in group])
        spent[name] = time.process_time() - began
    for group in groups.values():
        states, weights = [r.adapter for r in group], [r.num_examples for r in group]
        deltas = [products(state) for state in states]
        dense = {m: np.average([delta[m] for delta in deltas], axis=0, weights=weights) for m in deltas[0]}
        best = {m: truncated(array, rank) for m, array in dense.items()}
        found, residual = exact(states, weights)
        residuals.append(residual)
        errors["average"].append(relative(products(average(states, weights)), dense))
        errors["best of rank"].append(relative(best, dense))
        errors["exact"].append(relative(products(found), best))
    began, mixed, ranked = time.process_time(), [], {}
    for k, group in groups.items():
        states = [cut(r.adapter, rank // 2) if i % 2 else r.adapter for i, r in enumerate(group)]
        ranked[k] = states, exact(states, [r.num_examples for r in group])[0]
    spent["exact of mixed ranks"] = time.process_time() - began
    for k, (states, found) in ranked.items():
        best = {
            m: truncated(array, rank)
            for m, array in sliced(states, [r.num_examples for r in groups[k]]).items()
        }
        mixed.append(relative(products(found), best))
    cost = max(spent["exact"], spent["exact of mixed ranks"])
    share = cost / (spent["round"] + cost)
    worst = max(errors["exact"])
    rows = [
        ("adapters averaged, task clusters", f"{sum(map(len, groups.values()))}, {len(groups)}", "", None),
        ("average: relative error to the dense mean", f"{np.mean(errors['average']):.2e}", "", None),
        ("part that rank 8 cannot represent (residual)", f"{np.mean(residuals):.2e}", "", None),
        ("the same by dense SVD", f"{np.mean(errors['best of rank']):.2e}", "", None),
        ("exact: relative error to the best of its rank", f"{worst:.1e}", "≤ 1e-5", worst <= 1e-5),
        ("the same, ranks 8 and 4 mixed", f"{max(mixed):.1e}", "≤ 1e-5", max(mixed) <= 1e-5),
        ("seconds of a round's training", f"{spent['round']:.2f}", "", None),
        ("seconds of average, exact, exact of mixed ranks",
         ", ".join(f"{spent[n]:.3f}" for n in ("average", "exact", "exact of mixed ranks")), "", None),
        ("exact as a share of a round", f"{share:.2%}", "≤ 5 %", share <= 0.05),
    ]  # fmt: skip
    results = {
        "seconds": {k: round(v, 4) for k, v in spent.items()},
        "share": round(share, 5),
        "error_exact": worst,
        "error_exact_mixed": max(mixed),
        "error_average": float(np.mean(errors["average"])),
        "residual": float(np.mean(residuals)),
    }
    report("aggregation", results, rows)


def products(state: AdapterState) -> dict[str, np.ndarray]:
    """Return every module's dense ΔW, without the common scale."""
    return {
        name: state[name.replace("lora_A", "lora_B")].astype(np.float64) @ a.astype(np.float64)
        for name, a in state.items()
        if ".lora_A." in name
    }


def sliced(states: list[AdapterState], weights: list[int]) -> dict[str, np.ndarray]:
    """Return every module's dense ΔW: the sum of rank-1 slices, each averaged over the adapters with it."""
    found = {}
    for name in (name for name in states[0] if ".lora_A." in name):
        pairs = [(s[name].astype(np.float64), s[name.replace("lora_A", "lora_B")]) for s in states]
        total: np.ndarray = np.zeros(())
        for number in range(max(len(a) for a, _ in pairs)):
            slices = [(np.outer(b[:, number], a[number]), w) for (a, b), w in zip(pairs, weights, strict=True)
                      if number < len(a)]  # fmt: skip
            total = total + np.average([x for x, _ in slices], axis=0, weights=[w for _, w in slices])
        found[name] = total
    return found


def truncated(dense: np.ndarray, rank: int) -> np.ndarray:
    """Return the closest matrix of the given rank."""
    u, values, vt = np.linalg.svd(dense, full_matrices=False)
    found: np.ndarray = u[:, :rank] * values[:rank] @ vt[:rank]
    return found


def relative(found: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> float:
    """Return the relative Frobenius error over all modules."""
    off = sum(float(((found[m] - want[m]) ** 2).sum()) for m in want)
    return float(np.sqrt(off / sum(float((array**2).sum()) for array in want.values())))


if __name__ == "__main__":
    main()

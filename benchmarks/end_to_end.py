"""The whole pipeline: train, serve the bundle with vLLM, evaluate through the endpoint.

python benchmarks/end_to_end.py                              the built-in federation and its targets
python benchmarks/end_to_end.py --config examples/four_tasks.toml --data FILE --data FILE …

Also trains one FedAvg adapter with the same loop, clients, data, seeds and steps, but one cluster for
everything. One server has both and gets the same prompts for both.
"""

import argparse
import tempfile
import time
from pathlib import Path

from common import report
from rich.console import Console

from fedrouter.config_file import load_config
from fedrouter.evaluate import evaluate, load, render
from fedrouter.serve.checks import free_port
from fedrouter.serve.launch import Options, running_server
from fedrouter.train.run import train

FEDAVG = ["method=fedavg", "cluster={}"]


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path)
    parser.add_argument("--data", action="append", default=None)
    parser.add_argument("--limit", type=int, default=100, help="test prompts per task")
    # Settings were chosen with seeds 0 and 11 and their test prompts, so results must be of other seeds.
    parser.add_argument("--seed", type=int, default=1, help="seed of training data and test prompts")
    parser.add_argument("--name", default="end_to_end")
    parser.add_argument("--out", type=Path, help="directory for the runs; existing runs there are resumed")
    options = parser.parse_args()
    console = Console(width=110)
    scratch = tempfile.TemporaryDirectory()
    out = options.out or Path(scratch.name)
    seconds = {}
    bundles = {}
    for method, extra in (("fedrouter", []), ("fedavg", FEDAVG)):
        began = time.perf_counter()
        config = load_config(options.config, [f"seed={options.seed}", *extra])
        bundles[method] = train(config, out / method, console)
        seconds[method] = time.perf_counter() - began
    fedavg = bundles["fedavg"].adapter_path(bundles["fedavg"].clusters[0])
    models = ["fedrouter", "oracle", "fedavg", "base"]
    serving = Options(port=free_port(), adapters={"fedavg": fedavg})
    with running_server(bundles["fedrouter"].path, serving, log=out / "server.log") as url:
        records = load(options.data or ["builtin:four-tasks"], num_per_task=options.limit, seed=options.seed)
        measured = evaluate(url, records, models, limit_per_task=options.limit, console=console)
    console.print(render(measured))
    scored = {m.model: m for m in measured.models}
    rouge = {name: m.mean.rouge_1 for name, m in scored.items()}
    routing = scored["fedrouter"].routing
    accuracy = routing.accuracy if routing and routing.accuracy is not None else float("nan")
    builtin = options.config is None
    rows = [
        ("training seconds", f"{seconds['fedrouter']:.0f}", "≤ 300", seconds["fedrouter"] <= 300),
        (
            "task clusters found",
            str(len(bundles["fedrouter"].clusters)),
            "4",
            len(bundles["fedrouter"].clusters) == 4,
        ),
        (
            "routed mean ROUGE-1",
            f"{rouge['fedrouter']:.3f}",
            "≥ 0.80",
            rouge["fedrouter"] >= 0.80 if builtin else None,
        ),
        (
            "÷ oracle",
            f"{rouge['fedrouter'] / rouge['oracle']:.3f}",
            "≥ 0.99",
            rouge["fedrouter"] >= 0.99 * rouge["oracle"],
        ),
        (
            "÷ one FedAvg adapter",
            f"{rouge['fedrouter'] / rouge['fedavg']:.3f}",
            "≥ 1.061",
            rouge["fedrouter"] >= 1.061 * rouge["fedavg"],
        ),
        ("base alone", f"{rouge['base']:.3f}", "", None),
        ("routing accuracy", f"{accuracy:.4f}", "≥ 0.98", accuracy >= 0.98),
    ]
    by_task = {name: {t: round(s.rouge_1, 4) for t, s in m.by_task.items()} for name, m in scored.items()}
    results = {
        "seed": options.seed,
        "prompts": len(records),
        "train_seconds": {k: round(v, 1) for k, v in seconds.items()},
        "rouge_1": {k: round(v, 4) for k, v in rouge.items()},
        "rouge_1_by_task": by_task,
        "routing_accuracy": round(accuracy, 4),
        "failed": measured.num_failed,
    }
    report(options.name, results, rows)


if __name__ == "__main__":
    main()

"""Results of a grid, made up from a test's scores."""

from collections.abc import Callable

import numpy as np

from fedrouter.experiment.results import Line
from fedrouter.experiment.settings import Settings

TASKS = {"one": 12, "two": 12}


def settings_of(methods: list[str], seeds: list[int], metric: str = "rouge_1") -> Settings:
    return Settings.model_validate(
        {
            "seeds": seeds,
            "methods": {m: {"told": True} if m == "oracle" else {} for m in methods},
            "worlds": {"w": {"tests": ["x"], "metric": metric, "parameters": 1000}},
        }
    )


def lines_of(
    settings: Settings, mean: Callable[[str, str, str], float], noise: float = 0.05
) -> dict[str, Line]:
    """Return a line per cell; ``mean`` returns the score by scenario, method and evaluation."""
    draw = np.random.default_rng(0)
    lines: dict[str, Line] = {}
    for seed in settings.seeds:
        hard = {task: draw.normal(0, noise, num) for task, num in TASKS.items()}  # equal for all methods
        for scenario in settings.scenarios:
            for method in settings.methods:
                scores: Line = {"global/own": {"same as": "global/all"}}
                for name in ("global/all", "local/own", "local/all"):
                    prompts = {
                        t: [round(float(mean(scenario, method, name) + h), 3) for h in hard[t]] for t in TASKS
                    }
                    means = {
                        t: dict.fromkeys(("rouge_1", "rouge_l", "exact_match"), float(np.mean(p)))
                        for t, p in prompts.items()
                    }
                    scores[name] = {"prompts": prompts, "tasks": means}
                key = f"w/{scenario}/{method}/{seed}"
                lines[key] = {
                    "key": key, "world": "w", "scenario": scenario, "method": method, "seed": seed,
                    "learning_rate": 1e-3, "adapters": 4, "engine": "transformers", "scores": scores,
                    "train_seconds": 1.0, "answer_seconds": 1.0,
                    "routing": {"accuracy": 1.0, "beyond": 0.03},
                    "rounds": [{"round": r, "loss": 2.0 - r, "validation": 2.1 - r} for r in range(2)],
                    "traffic": {"adapter_bytes": 10, "bytes_per_round": 2**20},
                    "curve": [0.2, 0.3],
                }  # fmt: skip
    return lines

"""Merged adapters for prompts of no task cluster: the nearest adapters, weighted by distance.

As in LoRA composition (LORAUTER; LoraHub, Huang et al. 2023), the merged product BA is exactly the weighted
sum of the products. Weights are rounded to quarters, so that a server can load all merged adapters.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.numpy import save_file

from fedrouter.bundle import CONFIG, WEIGHTS, Bundle, read_weights
from fedrouter.files import write_atomically
from fedrouter.models import read_json
from fedrouter.train.lora import stack
from fedrouter.types import Decision

NEAREST = 2
STEPS = 4  # weights are multiples of 1 / STEPS

Mix = tuple[tuple[str, int], ...]  # (adapter, weight in quarters), nearest first


def mix_of(bundle: Bundle, decision: Decision) -> Mix:
    """Return the adapters of the two nearest task clusters, weighted by inverse squared distance."""
    adapter_of = {c.name: c.adapter for c in bundle.clusters}
    nearest = list(decision.distances.items())[:NEAREST]  # nearest first
    shares = [1 / max(distance, 1e-9) ** 2 for _, distance in nearest]
    first = max(round(STEPS * shares[0] / sum(shares)), 1)
    weights = [first, STEPS - first]
    return tuple((adapter_of[name], w) for (name, _), w in zip(nearest, weights, strict=False) if w)


def name_of(mix: Mix) -> str:
    """Return a name for a merged adapter."""
    return "--".join(f"{weight}-{adapter}" for adapter, weight in mix)


def write_mixes(bundle: Bundle, mixes: Mapping[str, Mix], directory: Path) -> dict[str, Path]:
    """Write merged adapters, all of rank 2r, in PEFT's format; return their directories by name."""
    paths = {}
    for name, mix in mixes.items():
        parts = list(mix) if len(mix) == NEAREST else [mix[0], (mix[0][0], 0)]
        states = [read_weights(bundle.adapter_paths[adapter]) for adapter, _ in parts]
        config = read_json(bundle.adapter_paths[mix[0][0]] / CONFIG)
        config |= {"r": NEAREST * config["r"], "lora_alpha": NEAREST * config["lora_alpha"]}
        paths[name] = directory / name
        paths[name].mkdir(parents=True, exist_ok=True)
        merged = stack(states, [weight / STEPS for _, weight in parts])
        save_file(dict(merged), paths[name] / WEIGHTS)
        write_atomically(paths[name] / CONFIG, json.dumps(config, indent=2) + "\n")
    return paths

"""Which modules of a base get adapters, judged by the model itself: what trains must be servable."""

import re
from collections.abc import Iterator, Sequence

import torch

from fedrouter.errors import ModelError

ALL = "all-linear"
# Architectures whose models vLLM 0.32 runs without adapters.
UNSERVED = (
    "BloomForCausalLM",
    "DbrxForCausalLM",
    "FalconForCausalLM",
    "GPT2LMHeadModel",
    "GPTJForCausalLM",
)


def check_targets(model: torch.nn.Module, targets: str | Sequence[str]) -> None:
    """Refuse a name in ``lora.target_modules`` that no module has, or whose adapters cannot be served.

    PEFT passes over a name that is not there if another fits.

    Raises
    ------
    ModelError
        If there is one, or vLLM serves no adapters of this kind of model.
    """
    name = type(model).__name__
    if name in UNSERVED:
        raise ModelError(
            f"vLLM serves no adapters on {name}, so what is trained could not be served: take another base"
        )
    modules = dict(model.named_modules())
    ends = {id(module): end for module, end in _ends(model)}
    for target in () if isinstance(targets, str) else targets:
        found = [m for n, m in modules.items() if n == target or n.endswith(f".{target}")]
        if not found:
            raise ModelError(
                f"lora.target_modules: the base has no module {target}; its linear ones are "
                + ", ".join(sorted({n.rpartition(".")[2] for n in adapted(model, ALL)}))
            )
        if end := next((ends[id(m)] for m in found if id(m) in ends), None):
            raise ModelError(
                f"lora.target_modules: {target} is the base's {end}, whose adapters are no pairs of factors "
                "beside a linear layer and cannot be averaged and served; leave it out"
            )
        if not any(n == target or n.endswith(f".{target}") for n in adapted(model, ALL)):
            raise ModelError(
                f"lora.target_modules: {target} is no linear layer of the language model; "
                "adapters on it cannot be served"
            )


def adapted(model: torch.nn.Module, targets: str | Sequence[str]) -> dict[str, tuple[int, int]]:
    """Return the modules that get adapters, by name: (inputs, outputs)."""
    ends = {id(module) for module, _ in _ends(model)}
    beside = outside(model)
    return {
        name: (module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and id(module) not in ends
        if beside is None or not re.fullmatch(beside, name)
        if targets == ALL or any(name == t or name.endswith(f".{t}") for t in targets)
    }


def for_peft(model: torch.nn.Module, targets: str | Sequence[str]) -> str | list[str]:
    """Return what PEFT is told: of a model with fused experts by name, or it would put adapters on these."""
    if isinstance(targets, str) and not _fused(model):
        return targets
    return (
        sorted({n.rpartition(".")[2] for n in adapted(model, ALL)})
        if isinstance(targets, str)
        else list(targets)
    )


def outside(model: torch.nn.Module) -> str | None:
    """Return a pattern of module names beside the language model of a wrapper, None where there are none.

    A model that also sees images trains its language model alone: that is what adapters are served on.
    """
    text = _language_model(model)
    if text is None:
        return None
    return rf"(?!{re.escape(text)}\.).*"


def left_out(model: torch.nn.Module) -> list[str]:
    """Return one line for each part of the base that adapters do not reach."""
    lines = []
    if (text := _language_model(model)) is not None:
        lines.append(
            f"adapters go into the base's language model ({text}) alone; what sees or hears stays as it is"
        )
    if fused := _fused(model):
        num, total = (sum(p.numel() for p in own) for own in (fused, model.parameters()))
        lines.append(
            f"the base's experts are fused: {num / total:.0%} of its weights are trained without adapters"
        )
    return lines


def _fused(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Return the weights of experts that are one tensor for all of them, not linear layers."""
    return [p for name, p in model.named_parameters() if p.ndim == 3 and ".experts." in f".{name}."]


def _language_model(model: torch.nn.Module) -> str | None:
    """Return the name of the language model inside a wrapper that holds other models as well."""
    config = getattr(model, "config", None)
    if config is None or config.get_text_config() is config:
        return None
    names = [name for name, _ in model.named_modules() if name.rpartition(".")[2] == "language_model"]
    return min(names, key=len) if names else None


def _ends(model: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, str]]:
    """Yield the embedding and the output layer."""
    for get, what in (("get_input_embeddings", "embedding"), ("get_output_embeddings", "output layer")):
        found = getattr(model, get)() if hasattr(model, get) else None
        if found is not None:
            yield found, what

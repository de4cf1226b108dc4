"""Choose the modules that get adapters from the loaded model, such that the adapters can be served."""

import re
from collections.abc import Iterator, Sequence

import torch

from fedrouter.errors import ModelError

ALL = "all-linear"
# Architectures for which vLLM 0.32 does not support adapters.
UNSERVED = (
    "BloomForCausalLM",
    "DbrxForCausalLM",
    "FalconForCausalLM",
    "GPT2LMHeadModel",
    "GPTJForCausalLM",
)


def check_targets(model: torch.nn.Module, targets: str | Sequence[str]) -> None:
    """Check every name in ``lora.target_modules``, because PEFT ignores unknown names if another one matches.

    Raises
    ------
    ModelError
        If no module has a name, its adapters cannot be served, or vLLM serves no adapters on this model.
    """
    name = type(model).__name__
    if name in UNSERVED:
        raise ModelError(
            f"vLLM serves no adapters on {name}, so trained adapters could not be served: use another base"
        )
    modules = dict(model.named_modules())
    ends = {id(module): end for module, end in _ends(model)}
    for target in () if isinstance(targets, str) else targets:
        found = [m for n, m in modules.items() if n == target or n.endswith(f".{target}")]
        if not found:
            raise ModelError(
                f"lora.target_modules: the base has no module {target}; its linear modules are "
                + ", ".join(sorted({n.rpartition(".")[2] for n in adapted(model, ALL)}))
            )
        if end := next((ends[id(m)] for m in found if id(m) in ends), None):
            raise ModelError(
                f"lora.target_modules: {target} is the base's {end}, whose adapters cannot be averaged and "
                "served; leave it out"
            )
        if not any(n == target or n.endswith(f".{target}") for n in adapted(model, ALL)):
            raise ModelError(
                f"lora.target_modules: {target} is no linear layer of the language model, "
                "and adapters on it cannot be served; leave it out"
            )


def adapted(model: torch.nn.Module, targets: str | Sequence[str]) -> dict[str, tuple[int, int]]:
    """Return the modules that get adapters: name → (inputs, outputs)."""
    ends = {id(module) for module, _ in _ends(model)}
    excluded = outside(model)
    return {
        name: (module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and id(module) not in ends
        if excluded is None or not re.fullmatch(excluded, name)
        if targets == ALL or any(name == t or name.endswith(f".{t}") for t in targets)
    }


def for_peft(model: torch.nn.Module, targets: str | Sequence[str]) -> str | list[str]:
    """Return PEFT's ``target_modules``; with fused experts the names, or PEFT would adapt the experts too."""
    if isinstance(targets, str) and not _fused(model):
        return targets
    return (
        sorted({n.rpartition(".")[2] for n in adapted(model, ALL)})
        if isinstance(targets, str)
        else list(targets)
    )


def outside(model: torch.nn.Module) -> str | None:
    """Return a pattern that matches all modules outside the language model; None without such modules.

    Of a multimodal model only the language model is trained, because adapters are served only on that part.
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
            f"only the base's language model ({text}) gets adapters; its image and audio parts do not change"
        )
    if fused := _fused(model):
        num, total = (sum(p.numel() for p in own) for own in (fused, model.parameters()))
        lines.append(
            f"the base's experts are fused and get no adapters: {num / total:.0%} of its weights are not "
            "trained"
        )
    return lines


def _fused(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Return the weights of experts that are stored as one tensor for all experts, not as linear layers."""
    return [p for name, p in model.named_parameters() if p.ndim == 3 and ".experts." in f".{name}."]


def _language_model(model: torch.nn.Module) -> str | None:
    """Return the module name of the language model within a multimodal model; None for other models."""
    config = getattr(model, "config", None)
    if config is None or config.get_text_config() is config:
        return None
    names = [name for name, _ in model.named_modules() if name.rpartition(".")[2] == "language_model"]
    return min(names, key=len) if names else None


def _ends(model: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, str]]:
    """Yield the embedding and the output layer with their names."""
    for getter, name in (("get_input_embeddings", "embedding"), ("get_output_embeddings", "output layer")):
        module = getattr(model, getter)() if hasattr(model, getter) else None
        if module is not None:
            yield module, name

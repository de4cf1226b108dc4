"""Checks of an untrusted PEFT adapter: only plain LoRA that vLLM serves as it was trained is accepted.

Refuses what vLLM would refuse at startup (``vllm/lora/peft_helper.py``), and options that vLLM would silently
ignore.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import safe_open

from fedrouter.bundle.files import MIB, first_problem, opened, read, shown
from fedrouter.bundle.manifest import CONFIG, WEIGHTS, Rank
from fedrouter.bundle.tensors import Tensor, read_header, read_tensors
from fedrouter.errors import BundleError
from fedrouter.types import AdapterState, Array

MAX_CONFIG = MIB
MAX_WEIGHTS = 16384 * MIB  # read tensor by tensor
PREFIX = "base_model.model."
FACTORS = {".lora_A.weight": 0, ".lora_B.weight": 1}  # name ending of a factor → axis of its rank
FLOATS = ("F32", "F16", "BF16")
QUANTISED = ("I8", "U8", "I32", "U32", "I64")  # packed weights of a base, whose shapes cannot be compared
INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")  # initialisations that do not change the base

Words = Annotated[list[Annotated[str, Field(max_length=1000)]], Field(max_length=100_000)]
Nothing = Annotated[list[Any], Field(max_length=0)] | None
Empty = Annotated[dict[str, Any], Field(max_length=0)] | None


class LoraFile(BaseModel):
    """``adapter_config.json``: options that vLLM applies, options that it may ignore, all others unused."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    peft_type: Literal["LORA"]
    r: Rank
    lora_alpha: Annotated[float, Field(gt=0, le=1e6)]
    target_modules: Words | Annotated[str, Field(max_length=1000)]  # a str is an untrusted regex: never run
    use_rslora: bool = False

    bias: Literal["none"] = "none"
    use_dora: Literal[False] = False
    lora_bias: Literal[False] = False
    use_qalora: Literal[False] = False
    modules_to_save: Nothing = None
    trainable_token_indices: Nothing | Empty = None
    target_parameters: Nothing = None
    layer_replication: Nothing = None
    alora_invocation_tokens: Nothing = None
    rank_pattern: Empty = None
    alpha_pattern: Empty = None
    use_bdlora: Empty = None
    init_lora_weights: bool | str | None = True

    # Options of the training, which do not affect serving.
    task_type: Literal["CAUSAL_LM"] | None = None
    auto_mapping: Any = None
    base_model_name_or_path: Any = None
    corda_config: Any = None
    ensure_weight_tying: Any = None
    eva_config: Any = None
    exclude_modules: Any = None
    fan_in_fan_out: Any = None
    inference_mode: Any = None
    layers_pattern: Any = None
    layers_to_transform: Any = None
    loftq_config: Any = None
    lora_dropout: Any = None
    lora_ga_config: Any = None
    megatron_core: Any = None
    peft_version: Any = None
    qalora_group_size: Any = None
    revision: Any = None
    runtime_config: Any = None

    @model_validator(mode="after")
    def _plain(self) -> "LoraFile":
        if isinstance(self.init_lora_weights, str) and self.init_lora_weights.lower() not in INITS:
            init = shown(self.init_lora_weights)
            raise ValueError(
                f"init_lora_weights {init} changes the base's weights, which are served unchanged"
            )
        for name, value in (self.model_extra or {}).items():
            if value:  # a newer PEFT writes null, false or empty for options that are not used
                raise ValueError(f"unknown option {shown(name)} is in use")
        return self

    def covers(self, module: str) -> bool:
        """Return whether a module is in ``target_modules``; True for a regex."""
        return isinstance(self.target_modules, str) or any(
            module == target or module.endswith(f".{target}") for target in self.target_modules
        )


@dataclass(frozen=True, slots=True)
class Adapter:
    """A checked adapter, without its weights."""

    path: Path
    rank: int
    shapes: Mapping[str, tuple[int, ...]]  # shapes of its tensors, by PEFT's names


def read_adapter(root: Path, directory: str = ".", hashes: Mapping[str, str] | None = None) -> Adapter:
    """Read and check a PEFT directory, including its weights.

    Parameters
    ----------
    root : directory that must contain all files, after links are resolved.
    directory : the PEFT directory, relative to ``root``.
    hashes : expected SHA-256 by path relative to ``root``, for an adapter of a bundle.

    Raises
    ------
    BundleError
        If a file cannot be read or has another hash, the adapter is not plain LoRA that vLLM serves, or a
        tensor is not finite or does not fit the configuration.
    """
    digests = hashes or {}
    name = f"{directory}/{CONFIG}"
    file = root / name
    try:
        config = LoraFile.model_validate_json(read(root, name, MAX_CONFIG, digests.get(name)))
    except ValidationError as error:
        raise BundleError(f"{file}: not plain LoRA that vLLM serves: {first_problem(error)}") from error
    name = f"{directory}/{WEIGHTS}"
    path = root / name
    with opened(root, name, MAX_WEIGHTS, digests.get(name)) as weights:
        tensors = read_header(weights, path)
        _check_factors(path, tensors, config)
        for _ in read_tensors(weights, path, tensors):
            pass  # checks that values are finite
    return Adapter(root / directory, config.r, {tensor.name: tensor.shape for tensor in tensors})


def read_weights(directory: Path) -> AdapterState:
    """Return the tensors of a checked adapter as float32, by PEFT's names."""
    path = directory / WEIGHTS
    with opened(directory, WEIGHTS, MAX_WEIGHTS) as weights:
        tensors = read_header(weights, path)
        arrays = read_tensors(weights, path, tensors)
        state: dict[str, Array] = {tensor.name: array.astype(np.float32) for tensor, array in arrays}
    return state


def check_modules(adapter: Adapter, base_path: Path) -> None:
    """Refuse an adapter that does not fit the base model.

    Raises
    ------
    BundleError
        If the base lacks a module of the adapter, or the module has another shape.
    """
    modules = _base_modules(base_path)
    for name, shape in adapter.shapes.items() if modules else ():
        module, ending = _parts(name)
        axis = 1 - FACTORS[ending]  # the axis that is not the rank's
        found = modules.get(module)
        if found is None:
            raise BundleError(
                f"{adapter.path / WEIGHTS}: the base model in {base_path} has no module {shown(module)}"
            )
        if found and shape[axis] != found[axis]:
            raise BundleError(
                f"{adapter.path / WEIGHTS}: tensor {shown(name)} {shape} does not fit the base model in "
                f"{base_path}, whose module has shape {found}"
            )


def _check_factors(path: Path, tensors: list[Tensor], config: LoraFile) -> None:
    names = {tensor.name for tensor in tensors}
    if not tensors:
        raise BundleError(f"{path}: contains no tensors")
    for tensor in tensors:
        module, ending = _parts(tensor.name)
        axis = FACTORS.get(ending)
        if axis is None or not module:
            raise BundleError(f"{path}: tensor {shown(tensor.name)} is not named like a LoRA factor")
        if tensor.dtype not in FLOATS:
            raise BundleError(
                f"{path}: tensor {tensor.name} is {tensor.dtype}; expected one of {', '.join(FLOATS)}"
            )
        if len(tensor.shape) != 2 or tensor.shape[axis] != config.r:
            raise BundleError(
                f"{path}: tensor {tensor.name} {tensor.shape} is not a LoRA factor of rank {config.r}"
            )
        if not {f"{PREFIX}{module}{factor}" for factor in FACTORS} <= names:
            raise BundleError(f"{path}: tensor {tensor.name} has no counterpart: A and B must be in pairs")
        if not config.covers(module):
            raise BundleError(f"{path}: tensor {tensor.name} is not of a module in target_modules")


def _parts(name: str) -> tuple[str, str]:
    """Return the module and the ending of a LoRA tensor's name; module "" if it is not PEFT's name."""
    ending = next((factor for factor in FACTORS if name.endswith(factor)), "")
    module = name.removeprefix(PREFIX).removesuffix(ending)
    return (module if name.startswith(PREFIX) and name.isprintable() else ""), ending


def _base_modules(base_path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a base model's modules, () where unknown; empty without safetensors files."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(base_path.glob("*.safetensors")):
        with safe_open(file, framework="numpy") as handle:
            for name in handle.keys():  # noqa: SIM118 - a safetensors handle, not a dict
                module, _, kind = name.rpartition(".")
                tensor = handle.get_slice(name)
                plain = kind == "weight" and tensor.get_dtype() not in QUANTISED
                shape = tuple(tensor.get_shape()) if plain else ()
                shapes[module] = shape if len(shape) == 2 else shapes.get(module, ())
    return shapes

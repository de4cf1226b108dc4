"""A PEFT adapter that somebody else wrote: plain LoRA that vLLM serves as it was trained, and nothing else.

What vLLM refuses (``vllm/lora/peft_helper.py``) is refused here before it starts; so is what it would pass
over in silence and serve otherwise than it was trained.
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
FACTORS = {".lora_A.weight": 0, ".lora_B.weight": 1}  # a factor's ending, and the axis of its rank
FLOATS = ("F32", "F16", "BF16")
QUANTISED = ("I8", "U8", "I32", "U32", "I64")  # of a base: packed, so that shapes say nothing
INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")  # these leave the base as it is

Words = Annotated[list[Annotated[str, Field(max_length=1000)]], Field(max_length=100_000)]
Nothing = Annotated[list[Any], Field(max_length=0)] | None
Empty = Annotated[dict[str, Any], Field(max_length=0)] | None


class LoraFile(BaseModel):
    """``adapter_config.json``: what vLLM applies, what is all the same to it, and all else switched off."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    peft_type: Literal["LORA"]
    r: Rank
    lora_alpha: Annotated[float, Field(gt=0, le=1e6)]
    target_modules: Words | Annotated[str, Field(max_length=1000)]  # a pattern is somebody else's: never run
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

    # How it was trained and from what: all the same to what serves.
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
            what = shown(self.init_lora_weights)
            raise ValueError(f"init_lora_weights {what} changes the base, which is served as it was")
        for name, value in (self.model_extra or {}).items():
            if value:  # null, false and empty: what a newer PEFT writes of something not used
                raise ValueError(f"{shown(name)} is in use, and unknown here")
        return self

    def covers(self, module: str) -> bool:
        """Return whether a module is one that the adapter says it is for."""
        return isinstance(self.target_modules, str) or any(
            module == target or module.endswith(f".{target}") for target in self.target_modules
        )


@dataclass(frozen=True, slots=True)
class Adapter:
    """What is known of an adapter without its weights."""

    path: Path
    rank: int
    shapes: Mapping[str, tuple[int, ...]]  # of its tensors, by PEFT's names


def read_adapter(root: Path, directory: str = ".", hashes: Mapping[str, str] | None = None) -> Adapter:
    """Read and check a PEFT directory, its weights included.

    Parameters
    ----------
    root : files lie in there, whatever links say.
    directory : below ``root``.
    hashes : SHA-256 by path below ``root``, of an adapter of a bundle.

    Raises
    ------
    BundleError
        If a file cannot be read or is another, it is no plain LoRA that vLLM serves, or a tensor is not
        finite or not as the configuration says.
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
            pass  # finite
    return Adapter(root / directory, config.r, {tensor.name: tensor.shape for tensor in tensors})


def read_weights(directory: Path) -> AdapterState:
    """Return the tensors of an adapter that was checked, as float32, by PEFT's names."""
    path = directory / WEIGHTS
    with opened(directory, WEIGHTS, MAX_WEIGHTS) as weights:
        tensors = read_header(weights, path)
        read_all = read_tensors(weights, path, tensors)
        state: dict[str, Array] = {tensor.name: array.astype(np.float32) for tensor, array in read_all}
    return state


def check_modules(adapter: Adapter, base_path: Path) -> None:
    """Refuse an adapter of another base model.

    Raises
    ------
    BundleError
        If it addresses a module that the base has not, or one of another shape.
    """
    modules = _base_modules(base_path)
    for name, shape in adapter.shapes.items() if modules else ():
        module, ending = _parts(name)
        other = 1 - FACTORS[ending]  # the axis that is the base's
        found = modules.get(module)
        if found is None:
            raise BundleError(f"{adapter.path / WEIGHTS}: {base_path} has no module {shown(module)}")
        if found and shape[other] != found[other]:
            raise BundleError(
                f"{adapter.path / WEIGHTS}: tensor {shown(name)} {shape} does not fit the base model in "
                f"{base_path}, whose module is {found}"
            )


def _check_factors(path: Path, tensors: list[Tensor], config: LoraFile) -> None:
    names = {tensor.name for tensor in tensors}
    if not tensors:
        raise BundleError(f"{path}: holds no tensors")
    for tensor in tensors:
        module, ending = _parts(tensor.name)
        axis = FACTORS.get(ending)
        if axis is None or not module:
            raise BundleError(f"{path}: tensor {shown(tensor.name)} is no LoRA factor by its name")
        if tensor.dtype not in FLOATS:
            raise BundleError(f"{path}: tensor {tensor.name} is {tensor.dtype}; expected one of {FLOATS}")
        if len(tensor.shape) != 2 or tensor.shape[axis] != config.r:
            raise BundleError(
                f"{path}: tensor {tensor.name} {tensor.shape} is no LoRA factor of rank {config.r}"
            )
        if not {f"{PREFIX}{module}{one}" for one in FACTORS} <= names:
            raise BundleError(f"{path}: tensor {tensor.name} has no counterpart")
        if not config.covers(module):
            raise BundleError(f"{path}: tensor {tensor.name} is of no module in target_modules")


def _parts(name: str) -> tuple[str, str]:
    """Return the module and the ending of a LoRA tensor's name; an empty module where it is not PEFT's."""
    ending = next((one for one in FACTORS if name.endswith(one)), "")
    module = name.removeprefix(PREFIX).removesuffix(ending)
    return (module if name.startswith(PREFIX) and name.isprintable() else ""), ending


def _base_modules(base_path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of a base model's modules, () where they do not say; empty without safetensors to look into."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(base_path.glob("*.safetensors")):
        with safe_open(file, framework="numpy") as handle:
            for name in handle.keys():  # noqa: SIM118 - a safetensors handle, not a dict
                module, _, kind = name.rpartition(".")
                held = handle.get_slice(name)
                plain = kind == "weight" and held.get_dtype() not in QUANTISED
                shape = tuple(held.get_shape()) if plain else ()
                shapes[module] = shape if len(shape) == 2 else shapes.get(module, ())
    return shapes

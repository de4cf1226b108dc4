"""Several adapters in one base model at once: the rows of a batch lie in blocks, each with its own adapter.

A small model leaves a large GPU waiting for Python: a step of one adapter takes as long as a step of thirty.
So all of them go through the base in one batch (batched matrix products; Punica, Chen et al. 2023, does the
same for serving), which computes for each what it would alone.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedrouter.errors import ModelError
from fedrouter.types import AdapterState

PREFIX, A, B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"  # PEFT's names of tensors


class StackedAdapters:
    """Adapters of equal shapes as rows of one matrix, put into a base model by hooks.

    Parameters
    ----------
    model : the base, or one with PEFT's layers, which must be switched off.
    like : an adapter of the shapes that all have.
    scale : what BA is multiplied by, alpha ÷ rank.
    dropout : of what goes into A, while ``training`` is set.

    Raises
    ------
    ModelError
        If an adapter is more than A and B beside modules of ``model``.
    """

    def __init__(self, model: torch.nn.Module, like: AdapterState, scale: float, dropout: float = 0.0):
        self._shapes = {name: array.shape for name, array in sorted(like.items())}
        self._scale, self._dropout, self.training = scale, dropout, False
        self._modules: dict[str, torch.nn.Module] = {}
        for name in self._shapes:
            if not name.startswith(PREFIX) or not name.endswith((A, B)):
                raise ModelError(f"adapters with {name} cannot be stacked: only plain A and B can")
            path = name.removeprefix(PREFIX).removesuffix(A).removesuffix(B)
            try:
                module: Any = model.get_submodule(path)
            except AttributeError as error:
                raise ModelError(f"adapters cannot be stacked: the base has no module {path}") from error
            self._modules[path] = getattr(module, "base_layer", module)
        self._parts: dict[str, tuple[Tensor, Tensor]] = {}

    def matrix(self, adapters: Sequence[AdapterState], device: torch.device) -> Tensor:
        """Return the adapters as (n, p) float32 on ``device``."""
        rows = [np.concatenate([state[name].ravel() for name in self._shapes]) for state in adapters]
        return torch.from_numpy(np.stack(rows).astype(np.float32)).to(device)

    def states(self, matrix: Tensor) -> list[AdapterState]:
        """Return the rows of (n, p) as adapters."""
        sizes = np.cumsum([int(np.prod(shape)) for shape in self._shapes.values()])[:-1]
        return [
            {
                name: np.ascontiguousarray(part.reshape(shape))
                for (name, shape), part in zip(self._shapes.items(), np.split(row, sizes), strict=True)
            }
            for row in matrix.detach().float().cpu().numpy()
        ]

    def use(self, matrix: Tensor, dtype: torch.dtype) -> None:
        """Let block i of the next batch go through row i of ``matrix``, (n, p)."""
        sizes = [int(np.prod(shape)) for shape in self._shapes.values()]
        parts = dict(zip(self._shapes, matrix.to(dtype).split(sizes, dim=1), strict=True))
        shaped = {name: part.unflatten(1, self._shapes[name]) for name, part in parts.items()}
        self._parts = {path: (shaped[PREFIX + path + A], shaped[PREFIX + path + B]) for path in self._modules}

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Have the base's modules add what the adapters in use give; without any in use they add nothing."""
        hooks = [
            module.register_forward_hook(partial(self._add, path)) for path, module in self._modules.items()
        ]
        try:
            yield
        finally:
            self._parts = {}
            for hook in hooks:
                hook.remove()

    def _add(self, path: str, _module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not self._parts:
            return output
        a, b = self._parts[path]  # (n, r, in), (n, out, r)
        x = inputs[0].reshape(len(a), -1, a.shape[2])  # (n, rows · tokens, in)
        if self.training and self._dropout:
            x = torch.nn.functional.dropout(x, self._dropout)
        low = torch.bmm(x.to(a.dtype), a.transpose(1, 2))
        added = torch.baddbmm(
            output.reshape(len(a), -1, b.shape[1]).to(a.dtype), low, b.transpose(1, 2), alpha=self._scale
        )
        return added.view(output.shape).to(output.dtype)

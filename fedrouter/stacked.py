"""Several adapters in one batch through a base model: each block of the batch's rows has its own adapter.

With a small model a large GPU waits for Python: a step of one adapter takes as long as a step of thirty. One
batch with batched matrix products computes the same for each adapter as a batch of its own would; Punica
(Chen et al. 2023) does this for serving.
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
    """Adapters of equal shapes as rows of one matrix, added to a base model by hooks.

    Parameters
    ----------
    model : the base, without PEFT's layers or with those layers disabled.
    like : an adapter with the shapes of all adapters.
    scale : factor on BA, alpha ÷ rank.
    dropout : dropout probability of A's input while ``training`` is True.

    Raises
    ------
    ModelError
        If ``like`` has tensors other than A and B, or for modules that ``model`` does not have.
    """

    def __init__(self, model: torch.nn.Module, like: AdapterState, scale: float, dropout: float = 0.0):
        self._shapes = {name: array.shape for name, array in sorted(like.items())}
        self._scale, self._dropout, self.training = scale, dropout, False
        self._modules: dict[str, torch.nn.Module] = {}
        for name in self._shapes:
            if not name.startswith(PREFIX) or not name.endswith((A, B)):
                raise ModelError(f"adapters with tensor {name} cannot be stacked: only A and B can")
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
        """Apply row i of ``matrix``, (n, p), to block i of the next batches."""
        sizes = [int(np.prod(shape)) for shape in self._shapes.values()]
        parts = dict(zip(self._shapes, matrix.to(dtype).split(sizes, dim=1), strict=True))
        shaped = {name: part.unflatten(1, self._shapes[name]) for name, part in parts.items()}
        self._parts = {path: (shaped[PREFIX + path + A], shaped[PREFIX + path + B]) for path in self._modules}

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Add the output of the adapters in use to the base's modules, within the context."""
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

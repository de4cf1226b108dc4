"""Screen updates before they are averaged; a refused update costs its client the round."""

import math
from collections.abc import Sequence

import numpy as np

from fedrouter.train.lora import distance
from fedrouter.types import AdapterState, TrainReply, TrainRequest

MIN_JUDGED = 4  # updates of a task cluster in one round below which none is refused as an outlier


def refusals(
    requests: Sequence[TrainRequest],
    replies: Sequence[TrainReply],
    batch_size: int,
    outlier: float,
    noisy: bool = False,
) -> list[str | None]:
    """Return for each reply of one round and task cluster why it is refused, or None if it is accepted.

    A reply is refused if its tensors differ from the sent ones in name, shape or type; if a value or the loss
    is not finite; or if it claims more examples than requested, or none. With at least ``MIN_JUDGED`` usable
    updates, one is also refused if its norm per requested step exceeds ``outlier`` times the median.
    Clients train for different numbers of steps, so norms are compared per step; with noise of the same norm
    on all updates, they are compared as they are.
    """
    reasons = [
        _unusable(request, reply, batch_size) for request, reply in zip(requests, replies, strict=True)
    ]
    judged = [i for i, reason in enumerate(reasons) if reason is None]
    if len(judged) < MIN_JUDGED:
        return reasons
    norms = {
        i: distance(requests[i].adapter, replies[i].adapter) / (1 if noisy else requests[i].steps)
        for i in judged
    }
    median = float(np.median(list(norms.values())))
    for i, norm in norms.items():
        if norm > outlier * median > 0:
            per_step = "" if noisy else " per step"
            reasons[i] = f"its update{per_step} is {norm / median:.0f} times as long as the median one"
    return reasons


def _unusable(request: TrainRequest, reply: TrainReply, batch_size: int) -> str | None:
    sent, new = request.adapter, reply.adapter
    if _shapes(new) != _shapes(sent):
        return "its update has other tensor names, shapes or types than the adapter it was sent"
    if not all(np.isfinite(array).all() for array in new.values()):
        return "its update holds values that are not finite; lower train.learning_rate"
    if reply.loss is not None and not math.isfinite(reply.loss):
        return "its loss is not finite; lower train.learning_rate"
    if not 0 < reply.num_examples <= request.steps * batch_size:
        return f"it claims {reply.num_examples} examples in {request.steps} steps of {batch_size}"
    return None


def _shapes(adapter: AdapterState) -> dict[str, tuple[tuple[int, ...], np.dtype[np.float32]]]:
    return {name: (array.shape, array.dtype) for name, array in adapter.items()}

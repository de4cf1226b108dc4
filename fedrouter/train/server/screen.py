"""What the server accepts of an update before it is averaged; everything else costs its client the round."""

import math
from collections.abc import Sequence

import numpy as np

from fedrouter.train.lora import distance
from fedrouter.types import AdapterState, TrainReply, TrainRequest

MIN_JUDGED = 4  # updates of a task cluster in one round; of fewer, none is told to be far out


def refusals(
    requests: Sequence[TrainRequest],
    replies: Sequence[TrainReply],
    batch_size: int,
    outlier: float,
    noisy: bool = False,
) -> list[str | None]:
    """Say of each reply to one round and task cluster why it is refused; None: it is not.

    Refused are: other tensor names, shapes or types than were sent; a value or a loss that is not finite;
    more examples than were asked for, or none; and, among ``MIN_JUDGED`` updates or more, one whose norm,
    divided by the steps asked for, is more than ``outlier`` times the median of these. Clients train for
    different numbers of steps, so plain norms would not compare; with noise of one length on all, they do.
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
            reasons[i] = f"its update is {norm / median:.0f} times as long as the median one, a step"
    return reasons


def _unusable(request: TrainRequest, reply: TrainReply, batch_size: int) -> str | None:
    sent, new = request.adapter, reply.adapter
    if _shapes(new) != _shapes(sent):
        return "its update has other tensor names, shapes or types than the adapter that was sent out"
    if not all(np.isfinite(array).all() for array in new.values()):
        return "its update holds values that are not finite; lower train.learning_rate"
    if reply.loss is not None and not math.isfinite(reply.loss):
        return "its loss is not finite; lower train.learning_rate"
    if not 0 < reply.num_examples <= request.steps * batch_size:
        return f"it claims {reply.num_examples} examples in {request.steps} steps of {batch_size}"
    return None


def _shapes(adapter: AdapterState) -> dict[str, tuple[tuple[int, ...], np.dtype[np.float32]]]:
    return {name: (array.shape, array.dtype) for name, array in adapter.items()}

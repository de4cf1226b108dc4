"""How much the hook takes on before it says no."""

from dataclasses import dataclass

from fedrouter.errors import ServingError

OVERLOADS = ("base", "reject")


@dataclass(frozen=True, slots=True)
class Limits:
    """What one server process takes on.

    Raises
    ------
    ServingError
        If a value makes no sense.
    """

    overload: str = "base"
    # what happens to a request that would wait too long: the base model answers, or 503 with Retry-After
    max_queue: int = 256
    # texts that may wait to be embedded, and of one request; a quarter of them for one request or tenant
    routing_timeout_s: float = 5.0
    # from a request's arrival at the queue to its decision, seconds
    max_body_mib: float = 8.0
    # of a request to a path that is read, MiB, and four times that for all large ones at once; images need
    # more

    def __post_init__(self) -> None:
        if self.overload not in OVERLOADS:
            raise ServingError(f"overload {self.overload!r} is none of {OVERLOADS}")
        for name in ("max_queue", "routing_timeout_s", "max_body_mib"):
            if not getattr(self, name) > 0:
                raise ServingError(f"{name} must be above 0, not {getattr(self, name)}")

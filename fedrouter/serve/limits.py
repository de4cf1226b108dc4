"""How much work the hook accepts before it refuses requests."""

from dataclasses import dataclass

from fedrouter.errors import ServingError

OVERLOADS = ("base", "reject")


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of one server process.

    Raises
    ------
    ServingError
        If a value is invalid.
    """

    overload: str = "base"
    # for requests that would wait too long; "base": the base model answers, "reject": 503 with Retry-After
    max_queue: int = 256
    # texts that may wait to be embedded, a quarter of them for one tenant; and prompts in one request
    routing_timeout_s: float = 5.0
    # seconds from a request's arrival in the queue to its decision
    max_body_mib: float = 8.0
    # size of one request body, MiB; all large bodies in work together may have four times as much

    def __post_init__(self) -> None:
        if self.overload not in OVERLOADS:
            raise ServingError(f"overload must be {' or '.join(OVERLOADS)}, not {self.overload!r}")
        for name in ("max_queue", "routing_timeout_s", "max_body_mib"):
            if not getattr(self, name) > 0:
                raise ServingError(f"{name} must be above 0, not {getattr(self, name)}")

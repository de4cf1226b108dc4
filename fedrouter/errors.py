"""The errors that a user can cause or resolve.

FedRouterError
├── ConfigError       a configuration file, key or command-line option
├── DataError         a data file or data set
├── ModelError        a base model or an embedder
│   └── EndpointError an embeddings endpoint that cannot be reached, or refuses the request
├── TrainingError     a run that cannot continue
│   └── WorkerError   a training process that has died
├── WireError         an invalid message from another machine
├── ClientError       clients that failed before the first round
├── BundleError       a bundle that cannot be written or must not be served
└── ServingError      a server that cannot start, or an endpoint that cannot be reached

Every message says in one line what was wrong, where, and what to do.
"""

from collections.abc import Mapping


class FedRouterError(Exception):
    """Base of all errors that the command line prints as one line."""


class ConfigError(FedRouterError):
    """A configuration file, key or command-line option is wrong."""


class DataError(FedRouterError):
    """A data file or data set cannot be used."""


class ModelError(FedRouterError):
    """A base model or embedder cannot be used."""


class EndpointError(ModelError):
    """An embeddings endpoint cannot be reached, or refuses the request."""


class TrainingError(FedRouterError):
    """A run cannot continue."""


class WorkerError(TrainingError):
    """A training process has died."""


class ClientError(FedRouterError):
    """Clients failed before the first round; the others can continue without them (left_out.py).

    Parameters
    ----------
    reasons : by client; must not quote the client's rows.
    """

    def __init__(self, reasons: Mapping[str, str]):
        self.reasons = reasons
        super().__init__("; ".join(f"client {name}: {reason}" for name, reason in reasons.items()))


class WireError(FedRouterError):
    """Bytes from another machine are not a valid message, or not the expected one."""


class BundleError(FedRouterError):
    """A bundle cannot be written or must not be served."""


class ServingError(FedRouterError):
    """A server cannot start, or an endpoint cannot be reached."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its type if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]

"""What users can do wrong, as one small hierarchy.

FedRouterError
├── ConfigError       a configuration file, key or command-line option
├── DataError         a data file or data set
├── ModelError        a base model or an embedder
│   └── EndpointError an embeddings endpoint that cannot be reached, or refuses
├── TrainingError     a run that cannot go on
│   └── WorkerError   a training process that is gone
├── WireError         bytes of another machine that are no message
├── ClientError       clients that could not do their part before the rounds
├── BundleError       a bundle that cannot be written or must not be served
└── ServingError      a server that cannot start, or an endpoint that cannot be reached

Every message says what was wrong, where, and what to do, in one line.
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
    """An embeddings endpoint cannot be reached, or refuses."""


class TrainingError(FedRouterError):
    """A run cannot go on."""


class WorkerError(TrainingError):
    """A training process is gone."""


class ClientError(FedRouterError):
    """Clients could not do their part before the rounds; without them the others can (left_out.py).

    Parameters
    ----------
    reasons : by client, in no word of its rows.
    """

    def __init__(self, reasons: Mapping[str, str]):
        self.reasons = reasons
        super().__init__("; ".join(f"client {name}: {reason}" for name, reason in reasons.items()))


class WireError(FedRouterError):
    """Bytes that came from another machine are no message, or not one that belongs here."""


class BundleError(FedRouterError):
    """A bundle cannot be written or must not be served."""


class ServingError(FedRouterError):
    """A server cannot start, or an endpoint cannot be reached."""


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, or its type's name where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]

"""The base model ``builtin:tiny`` and the data set ``builtin:four-tasks``, which ship with the package."""

from pathlib import Path

from fedrouter.errors import ConfigError

PREFIX = "builtin:"
BASES = ("builtin:tiny",)


def is_builtin(name: str) -> bool:
    """Return whether a name refers to something that ships with the package."""
    return name.startswith(PREFIX)


def base_path(name: str) -> Path:
    """Return the folder of a built-in base model.

    Raises
    ------
    ConfigError
        If there is no such built-in base model.
    """
    if name not in BASES:
        raise ConfigError(f"unknown built-in base model {name!r}: choose one of {', '.join(BASES)}")
    return Path(__file__).parent / name.removeprefix(PREFIX)

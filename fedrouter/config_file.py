"""Configuration files: TOML and overrides → settings; the resolved settings stored in a run."""

import difflib
import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from fedrouter.config import Config
from fedrouter.errors import ConfigError

Model = TypeVar("Model", bound=BaseModel)

ELSEWHERE = "(on the client's machine)"
BUILTIN_CONFIG = Path(__file__).parent / "builtin" / "four_tasks.toml"


def load_config(
    path: Path | None, overrides: Sequence[str] = (), clients: Sequence[str] | None = None
) -> Config:
    """Read a TOML file, or the built-in one; apply ``section.key=value`` overrides; validate.

    Relative data and model paths in the file are resolved against the file's directory.

    Parameters
    ----------
    clients : names of clients on other machines, which have the data; the file must not have a data section.

    Raises
    ------
    ConfigError
        If the file is missing or not TOML, a key is unknown or a value is invalid.
    """
    values: dict[str, Any] = {}
    if path is None:
        values = tomllib.loads(BUILTIN_CONFIG.read_text(encoding="utf-8"))
    else:
        values = read_toml(path, f"configuration {path}")
        resolve_paths(values, path.parent)
    for override in overrides:
        _apply(values, override)
    if clients is not None:
        if path is not None and values.get("data"):
            raise ConfigError(f"{path}: with --federation the sites configure their data; remove [data]")
        values["data"] = {"clients": dict.fromkeys(clients, ELSEWHERE)}
    elif (data := values.get("data")) and isinstance(data, dict) and data.get("clients") == {}:
        raise ConfigError(
            f"{path or 'configuration'}: data.clients is empty; give clients and their data, or remove it "
            "and give data.source"
        )
    return fitted(values, Config, str(path) if path else "configuration")


def read_toml(path: Path, name: str | None = None, missing: str | None = None) -> dict[str, Any]:
    """Read a TOML file.

    Parameters
    ----------
    name : name of the file in error messages; default: its path.
    missing : error message if the file does not exist.

    Raises
    ------
    ConfigError
        If the file is missing, or not readable as TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise ConfigError(missing or f"{name or path}: no such file") from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{name or path}: {error}") from error


def fitted(values: dict[str, Any], model: type[Model], name: str) -> Model:
    """Return values as settings.

    Raises
    ------
    ConfigError
        If a key is unknown or a value is invalid; the message begins with ``name``.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{name}: " + "; ".join(explained(e, model) for e in error.errors())) from error


def read_resolved(file: Path) -> Config:
    """Read a run's resolved configuration.

    Raises
    ------
    ConfigError
        If the file is missing, or this version cannot read it.
    """
    try:
        return validated(json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise ConfigError(f"{file.parent} is not a run: it contains no config.json") from error
    except ValidationError as error:
        raise ConfigError(f"{file}: " + "; ".join(explained(e, Config) for e in error.errors())) from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: not readable as a run's configuration: {error}") from error


def validated(resolved: Any) -> Config:
    """Return resolved settings as a configuration.

    Defaults are removed first: some settings are refused beside others even at their default value.

    Raises
    ------
    ValueError
        If a key is unknown or a value is invalid.
    """
    if not isinstance(resolved, dict):
        raise ValueError("expected an object")
    return Config.model_validate(_differing(resolved, Config().model_dump(mode="json", by_alias=True)))


def _differing(values: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    pairs = {k: (v, defaults.get(k)) for k, v in values.items() if k not in defaults or v != defaults[k]}
    return {
        k: _differing(v, d) if d and isinstance(v, dict) and isinstance(d, dict) else v
        for k, (v, d) in pairs.items()
    }


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override}: expected section.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word: --set data.partition=single
    *sections, last = key.strip().split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ConfigError(f"--set {override}: {section} is not a section")
    values[last] = value


def resolve_paths(values: dict[str, Any], directory: Path) -> None:
    """Make relative paths absolute if they exist below ``directory``; other names are hub ids.

    A cache is always a path, and made there.
    """

    def resolve(name: Any) -> Any:
        if isinstance(name, list):
            return [resolve(n) for n in name]
        if (
            isinstance(name, str)
            and name.strip()
            and (name.startswith((".", "/")) or (directory / name).exists())
        ):
            return str((directory / name).resolve())
        return name

    places = {
        "base": ("model", "chat_template"),
        "data": ("source",),
        "embedder": ("model",),
        "routing": ("probes",),
    }
    for section, keys in places.items():
        table = values.get(section)
        if isinstance(table, dict) and table.get("kind") != "endpoint":  # its model is no path
            given = {key: table[key] for key in keys if key in table}
            table |= {key: resolve(name) for key, name in given.items() if name != "alpaca"}  # built in
    match values:
        case {"embedder": {"cache": str(cache)}}:
            values["embedder"]["cache"] = str((directory / cache).resolve())
    match values:
        case {"data": {"clients": dict(clients)}}:
            values["data"]["clients"] = {name: resolve(source) for name, source in clients.items()}


def explained(error: Any, model: Any) -> str:
    """Return a readable message for one of pydantic's errors about settings of ``model``."""
    location = [str(part) for part in error["loc"]]
    key = ".".join(location)
    if error["type"] == "extra_forbidden":
        known = _known_keys(model, location[:-1])
        close = difflib.get_close_matches(location[-1], known, 1)
        hint = f"did you mean {close[0]}?" if close else f"known here: {', '.join(known)}"
        return f"unknown key {key}; {hint}"
    if error["type"] == "missing":  # its input is the whole section
        return f"missing key {key}"
    message = error["msg"].removeprefix("Value error, ")
    return (
        message if not key or error["type"] == "value_error" else f"{key}: {message} (got {error['input']!r})"
    )


def _known_keys(model: Any, location: Sequence[str]) -> list[str]:
    for part in location:
        model = model.model_fields[part].annotation
    return [field.alias or name for name, field in model.model_fields.items()]

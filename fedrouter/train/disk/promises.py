"""The secret that a run's noise is made with, and what the noise promises, beside the run."""

import json
import secrets
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from fedrouter.config import PrivacySettings
from fedrouter.files import write_atomically
from fedrouter.types import Guarantee

KEY = "noise.key"


def noise_key(run: Path, settings: PrivacySettings) -> bytes:
    """Return the secret of a run's noise: the one that lies there, or one drawn from the operating system.

    Without it a resumed run would answer the same questions with other noise, and who averages both learns
    more than was promised. The seed would not do: it is known.
    """
    if not settings.noisy:
        return b""
    file = run / KEY
    return bytes.fromhex(file.read_text(encoding="utf-8")) if file.exists() else secrets.token_bytes(32)


def keep_promises(run: Path, settings: PrivacySettings, promised: Sequence[Guarantee], key: bytes) -> None:
    """Write what the noise promises beside the run, and its secret, which only the owner may read."""
    record = {**settings.model_dump(), "guarantees": [asdict(g) for g in promised]}
    write_atomically(run / "privacy.json", json.dumps(record, indent=2) + "\n")
    write_atomically(run / KEY, key.hex(), mode=0o600)

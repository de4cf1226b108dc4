"""Files for differential privacy: the secret behind a run's noise, and the guarantees it gives."""

import json
import secrets
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from fedrouter.config import PrivacySettings
from fedrouter.files import read_secret, write_atomically
from fedrouter.types import Guarantee

KEY = "noise.key"


def noise_key(run: Path, settings: PrivacySettings) -> bytes:
    """Return the secret of a run's noise: the stored one, or a new one from the operating system.

    A resumed run must draw the same noise again: averaging two noisy answers would reveal more than the
    guarantee allows. The run's seed cannot replace the secret because it is public.
    """
    if not settings.noisy:
        return b""
    file = run / KEY
    return read_secret(file) if file.exists() else secrets.token_bytes(32)


def keep_promises(run: Path, settings: PrivacySettings, promised: Sequence[Guarantee], key: bytes) -> None:
    """Write the guarantees and the secret into the run's directory; only the owner may read the secret."""
    record = {**settings.model_dump(), "guarantees": [asdict(g) for g in promised]}
    write_atomically(run / "privacy.json", json.dumps(record, indent=2) + "\n")
    write_atomically(run / KEY, key.hex(), mode=0o600)

"""Small files of a run, written whole or not at all."""

from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Write under a temporary name, then rename."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)

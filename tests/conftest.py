"""For every test: real vLLM last, and the same hypothesis examples on every machine, however slow."""

import pytest
from hypothesis import settings

settings.register_profile("fedrouter", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("fedrouter")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what lies in tests/e2e and move it to the end: a broken unit is known within a minute."""
    for item in items:
        if "e2e" in item.path.parts:
            item.add_marker("e2e")
    items.sort(key=lambda item: item.get_closest_marker("e2e") is not None)

"""For every test: real vLLM last, and the same hypothesis examples on every machine, however slow."""

import pytest
from hypothesis import settings as hypothesis_settings
from rich.console import Console

from fedrouter.bundle import Bundle
from fedrouter.config import load_config
from fedrouter.train.run import train

hypothesis_settings.register_profile("fedrouter", deadline=None, derandomize=True, max_examples=50)
hypothesis_settings.load_profile("fedrouter")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what lies in tests/e2e and move it to the end: a broken unit is known within a minute."""
    for item in items:
        if "e2e" in item.path.parts:
            item.add_marker("e2e")
    items.sort(key=lambda item: item.get_closest_marker("e2e") is not None)


@pytest.fixture(scope="session")
def small_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle really trained, briefly: four clients, four task clusters, the built-in base."""
    settings = [
        "data.num_clients=4",
        "data.num_per_task=60",
        "train.rounds=2",
        "train.steps=4",
        "cluster.global=4",
    ]
    return train(load_config(None, settings), tmp_path_factory.mktemp("small") / "run", Console(quiet=True))

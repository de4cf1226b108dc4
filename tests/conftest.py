"""Order of the tests, units first and real vLLM last; the same hypothesis examples on every machine."""

from pathlib import Path

import pytest
from hypothesis import settings as hypothesis_settings

hypothesis_settings.register_profile("fedrouter", deadline=None, derandomize=True, max_examples=50)
hypothesis_settings.load_profile("fedrouter")

WHOLE_RUNS = Path(__file__).parent / "e2e"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print a warning if the console's tests were skipped, which is easily overlooked."""
    skipped = [one for one in terminalreporter.stats.get("skipped", []) if "NO CHROMIUM" in str(one.longrepr)]
    if skipped:
        terminalreporter.section("THE CONSOLE WAS NOT TESTED", red=True, bold=True)
        terminalreporter.line(f"{len(skipped)} tests: apt-get install -y chromium chromium-driver", red=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests in tests/e2e and move them to the end, so that broken units show within a minute."""

    def weight(item: pytest.Item) -> int:
        return (WHOLE_RUNS in item.path.parents) * (1 + ("server" in getattr(item, "fixturenames", ())))

    for item in items:
        if weight(item):
            item.add_marker("e2e")
    items.sort(key=weight)

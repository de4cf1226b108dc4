"""Tables that never truncate a name."""

from io import StringIO

import pytest
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedrouter.layout import Whole, show

NAMES = ["data-to-text-with-a-long-name-0123abcd", "dialogue-summary-89ef0123", "[red]odd[/red]-4567cdef"]


def shown(width: int, terminal: bool) -> str:
    table = Table("task", title="prompts by adapter")
    for name in NAMES:
        table.add_column(name)
    table.add_row("[/b] headline [x]", *["1", "", "3"])
    table.add_section()
    table.add_row("last", *map(Text, NAMES))
    console = Console(file=StringIO(), width=width, force_terminal=terminal, color_system=None)
    show(console, Whole(table))
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("width", [20, 80, 200])
def test_every_name_stands_whole_on_one_line(width: int, terminal: bool) -> None:
    lines = shown(width, terminal).splitlines()
    for name in [*NAMES, "[/b] headline [x]", "prompts by adapter"]:
        assert any(name in line for line in lines), name


def test_a_narrow_terminal_gets_blocks_and_a_file_the_table() -> None:
    assert "│" in shown(200, True)
    assert "│" not in shown(40, True)
    assert "│" in shown(40, False)
    assert "  dialogue-summary-89ef0123: dialogue-summary-89ef0123" in shown(40, True)

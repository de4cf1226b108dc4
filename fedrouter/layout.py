"""Terminal output: tables that never truncate a cell, numbers of things, and sizes in bytes."""

from collections.abc import Iterator

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

UNBOUNDED = 10_000  # columns


class Whole:
    """A table at its full width; on a terminal narrower than that, one block of lines per row.

    Markup in cells and heads is not interpreted: they contain names from data.
    """

    def __init__(self, table: Table):
        self._table = table
        for column in table.columns:
            column.no_wrap = True

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        wide = options.update(width=UNBOUNDED, max_width=UNBOUNDED, markup=False)
        width = Measurement.get(console, wide, self._table).maximum
        if width <= options.max_width or not console.is_terminal:
            self._table.width = width
            yield from console.render(self._table, wide)
        else:
            yield from self._blocks()

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(1, options.max_width)

    def _blocks(self) -> Iterator[RenderableType]:
        if self._table.title:
            yield Text.assemble(_text(self._table.title), style="italic")
        heads = [str(column.header) for column in self._table.columns]
        for first, *cells in zip(*(column.cells for column in self._table.columns), strict=True):
            yield Text.assemble(_text(first), style="bold", no_wrap=True, overflow="ignore")
            for head, cell in zip(heads[1:], map(_text, cells), strict=True):
                if cell.plain:
                    yield Text.assemble((f"  {head}: ", "dim"), cell, no_wrap=True, overflow="ignore")


def show(console: Console, content: RenderableType) -> None:
    """Print something without cropping: rich would crop lines in files to a default width."""
    console.print(content, crop=False)


def print_line(console: Console, line: str) -> None:
    """Print text as it is: no markup (it contains names from data), no highlighting, no wrapping."""
    console.print(line, highlight=False, soft_wrap=True, markup=False)


def number_of(number: int, noun: str) -> str:
    """Return a number and a noun, with an s unless the number is 1."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def size_text(number: float) -> str:
    """Format a number of bytes."""
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.0f} {unit}"
        number /= 1024
    return f"{number:.1f} GiB"


def _text(cell: RenderableType) -> Text:
    return cell if isinstance(cell, Text) else Text(str(cell))

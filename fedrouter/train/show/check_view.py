"""Output of ``fedrouter check``; names and rows are printed without interpreting markup."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedrouter.layout import Whole, number_of, print_line, size_text
from fedrouter.layout import show as show_whole
from fedrouter.train.check import Report, ShownRow

OPEN, CLOSE = "⟦", "⟧"  # around tokens that carry loss, without colours


def show(report: Report, console: Console) -> None:
    """Print a report: files, clients, rows as the model sees them, lengths, costs, revealed data."""

    def line(text: str) -> None:
        print_line(console, text)

    for file in report.files:
        forms = ", ".join(f"{form}: {number}" for form, number in file["forms"].items())
        line(f"{file['source']}: {number_of(file['num_rows'], 'row')} ({forms})")
    table = Table("client", "rows", "steps per round")
    for client in report.clients:
        table.add_row(Text(client.name), str(client.num_rows), str(client.steps))
    show_whole(console, Whole(table))
    for client in report.clients:
        for row in client.rows:
            line(f"{client.name}, {row.where or 'a built-in row'}, {row.num_tokens} tokens:")
            console.print(as_text(row, colours=console.is_terminal), highlight=False, soft_wrap=True)
    marks = "green" if console.is_terminal else f"{OPEN}…{CLOSE}"
    line(f"tokens with loss: {marks}\n\ntokens per row:")
    most = max((number for _, _, number in report.histogram), default=1)
    for low, high, number in report.histogram:
        line(f"{low:>7}–{high:<7} {'█' * round(40 * number / most)} {number}")
    needed = ", ".join(f"{length} would hold {share}" for share, length in report.needed.items())
    line(f"limit {report.limit}: {number_of(report.num_cut, 'row')} cut; {needed} of the rows")
    sizes = _count(report.num_parameters), _count(report.adapter_parameters), size_text(report.memory_bytes)
    line("base {} parameters, each adapter {}; memory about {}".format(*sizes))
    line(
        f"about {report.round_s:.0f} s per round; per client, round and task cluster: "
        f"{size_text(report.bytes_down)} down, {size_text(report.bytes_up)} up"
    )
    revealed = ", ".join(f"{message} {size_text(number)}" for message, number in report.reveals.items())
    line(f"each client reveals before the rounds, at most: {revealed} (see docs/privacy.md)")
    for note in report.notes:
        line(f"note: {note}")
    line("no errors: this configuration can be trained")


def as_text(row: ShownRow, colours: bool) -> Text:
    """Return a row as text, with the parts that carry loss coloured or between marks."""
    text = Text()
    for part, learned in row.parts:
        if colours:
            text.append(part, style="green" if learned else "dim")
        else:
            text.append(f"{OPEN}{part}{CLOSE}" if learned else part)
    return text


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.2f} M"

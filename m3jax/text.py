"""Sizes, times, counts, names and tables as text for people."""

from collections.abc import Iterator, Sequence
from html import escape

Row = Sequence[str]

# --- Numbers and names -----------------------------------------------------------------------------------


def size_text(count: float) -> str:
    """A number of bytes in decimal units.

    Example:
        >>> size_text(999), size_text(2_200_000_000)
        ('999 B', '2.2 GB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.95 or (unit == "B" and count < 1000):
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def time_text(seconds: float) -> str:
    """A span of time as people say it.

    Example:
        >>> time_text(0.21), time_text(4.4), time_text(200), time_text(4000)
        ('0.2 s', '4 s', '3 min 20 s', '1 h 06 min')
    """
    if seconds < 3:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def share_text(part: int, whole: int) -> str:
    """A share in percent, of which 0 % and 100 % are said only where they are exact.

    Example:
        >>> share_text(1, 3), share_text(999_999, 1_000_000), share_text(5, 5)
        ('33.33 %', '99.99 %', '100 %')
    """
    if not whole:
        return "–"
    if part in (0, whole):
        return "100 %" if part else "0 %"
    return f"{min(max(100 * part / whole, 0.01), 99.99):.2f} %"


def number_text(value: float | None) -> str:
    """A measured number to four digits; a dash where there is none."""
    return "–" if value is None else f"{value:.4g}"


def count_text(count: int, noun: str) -> str:
    """A count with its noun: `1 tensor`, `2,000 tensors`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def shape_text(shape: Sequence[int]) -> str:
    """A shape as people write it.

    Example:
        >>> shape_text((32, 64)), shape_text(())
        ('32 × 64', 'scalar')
    """
    return " × ".join(map(str, shape)) or "scalar"


def safe_text(text: str) -> str:
    """`text` with what is not to be seen escaped, so that no file can steer a terminal by the names it holds.

    Example:
        >>> safe_text("größe\\x1b[2J")
        'größe\\\\x1b[2J'
    """
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


# --- Tables ----------------------------------------------------------------------------------------------


def html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as HTML, in which nothing of the cells is taken for markup.

    Args:
        head: Names of the columns.
        rows: The cells.
    """
    lines = [("th", head), *(("td", row) for row in rows)]
    made = ("".join(f"<{tag}>{escape(safe_text(cell))}</{tag}>" for cell in cells) for tag, cells in lines)
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in made)}</table>"


def table(
    head: Row, rows: Sequence[Row], width: int | None = None, left: int = 1, spare: int | None = None
) -> Iterator[str]:
    """Aligned lines.

    Args:
        head: The columns' names.
        rows: Their values.
        width: Longest line wanted; where rows would be longer, the first column has lines of its own.
        left: How many columns, from the first, are aligned to the left.
        spare: A column to leave out first where rows would be too long.

    Yields:
        The lines.

    Example:
        >>> print("\\n".join(table(["name", "bytes"], [["bias", "8 B"], ["weight", "128 B"]])))
        name    bytes
        bias      8 B
        weight  128 B
    """
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    stacked = width is not None and sum(widths) + 2 * (len(widths) - 1) > width
    if stacked and spare is not None:
        narrower = [[*row[:spare], *row[spare + 1 :]] for row in (head, *rows)]
        yield from table(narrower[0], narrower[1:], width, left)
        return
    for row in (head, *rows):
        cells = [
            cell.ljust(room) if index < left else cell.rjust(room)
            for index, (cell, room) in enumerate(zip(row, widths, strict=True))
        ]
        if stacked:
            yield row[0]
            yield "    " + "  ".join(cells[1:]).rstrip()
        else:
            yield "  ".join(cells).rstrip()

"""Plain tables for a terminal, and tables in Markdown."""

from collections.abc import Sequence

TABLE_WIDTH = 100


def text_table(
    lines: Sequence[Sequence[str]], texts: int, *, shrinks: int = 0, footer: bool = False
) -> str:
    """A header, rows and perhaps a footer, in columns, at most 100 letters wide.

    Args:
        lines: the header first; the footer, if there is one, last.
        texts: how many columns hold text, which stands on the left; numbers stand on the right.
        shrinks: the column of text that gives way where the table would be too wide.
        footer: whether the last line has a rule above it.
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    others = sum(widths) - widths[shrinks] + 2 * (len(widths) - 1)
    widths[shrinks] = min(widths[shrinks], max(TABLE_WIDTH - others, 8))
    header, *rows = (
        "  ".join(
            elide(cell, width).ljust(width) if i < texts else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
    rule = "  ".join("-" * width for width in widths)
    if footer:
        rows.insert(len(rows) - 1, rule)
    return "\n".join((header, rule, *rows))


def markdown_table(lines: Sequence[Sequence[str]], texts: int) -> str:
    """The header, which is the first line, and rows; numbers stand right of `texts` columns."""
    header, *rows = lines
    rule = ["---"] * texts + ["---:"] * (len(header) - texts)
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *rows))


def elide(text: str, width: int) -> str:
    """Keep the end: it tells the layers of a deep network apart."""
    return text if len(text) <= width else "…" + text[len(text) - width + 1 :]

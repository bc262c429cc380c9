"""A table of text, for the terminal or in Markdown."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NamedTuple

from rich.console import Console
from rich.table import Table as RichTable


class Table(NamedTuple):
    """Title, columns and rows; the columns in ``left`` are aligned to the left."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: Sequence[int] = (0,)

    def markdown(self) -> str:
        rule = "|".join("---" if i in self.left else "---:" for i in range(len(self.columns)))
        lines = [f"**{self.title}**", ""] if self.title else []
        lines += ["| " + " | ".join(self.columns) + " |", f"|{rule}|"]
        return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in self.rows)])

    def print(self, width: int = 120) -> None:
        """On a terminal as wide as that is, else in so many columns."""
        table = RichTable(title=self.title, title_justify="left")
        for index, column in enumerate(self.columns):
            table.add_column(column, justify="left" if index in self.left else "right")
        for row in self.rows:
            table.add_row(*row)
        Console(width=None if sys.stdout.isatty() else width).print(table)


def print_tables(tables: Sequence[Table], markdown: bool) -> None:
    if markdown:
        print("\n\n".join(table.markdown() for table in tables))
        return
    for table in tables:
        table.print()

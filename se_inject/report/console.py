"""Prints tables on terminals of any width."""

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table


def print_table(console: Console, table: Table) -> None:
    """Print a table without cutting any figure. A console that is too narrow wraps the lines."""
    width = console.width
    unlimited = console.options.update(max_width=1000)
    console.width = max(width, Measurement.get(console, unlimited, table).minimum)
    console.print(table, crop=False)
    console.width = width

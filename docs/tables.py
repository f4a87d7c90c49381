"""What the tables of the docs have in common."""

from __future__ import annotations


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def goals_table(rows: list[tuple[str, str, str]]) -> str:
    lines = ["| figure | measured | goal |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {value} | {goal} |" for name, value, goal in rows)])

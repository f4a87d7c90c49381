"""What tables and plots call the students that are reflowed."""

from __future__ import annotations

from rectiflow.reproduce.instaflow import SEEDS

OPTIONS = {
    "2rf-start-exact": "exact start",
    "2rf-time-u-shaped": "u-shaped times",
    "2rf-time-logit-normal": "logit-normal times",
    "2rf-time-grid": "only the time of one step",
    "2rf-loss-huber": "pseudo-Huber",
    "2rf-loss-lpips-huber": "LPIPS-Huber, a quarter of the samples",
    "2rf-curation-longest": "without the tenth of longest pairs",
    "2rf-curation-flip": "half of the pairs mirrored",
    "2rf-coupling-annealed": "annealed from independent noise",
    "2rf-optimizer-muon": "Muon for the hidden matrices",
    "2rf-huber-muon": "pseudo-Huber and Muon",
    "online": "pairs made on the fly, a quarter of the samples",
}
"""The paper's reflow with one setting changed, beside `paper-2rf-0`."""
REFLOWS = {
    "paper-2rf-0": "the paper's recipe",
    **OPTIONS,
    "2rf-0": "exact start, u-shaped times",
    "emoji-2rf": "as shipped",
}
"""All that are compared."""


def by_seed(name: str) -> list[str]:
    """What a student is called with each training seed; some have one only.

    Example:
        >>> by_seed("paper-2rf-0")
        ['paper-2rf-0', 'paper-2rf-1', 'paper-2rf-2']
        >>> by_seed("2rf-loss-huber")
        ['2rf-loss-huber', '2rf-loss-huber-1', '2rf-loss-huber-2']
    """
    stem = name.removesuffix("-0")
    return [name, *(f"{stem}-{seed}" for seed in SEEDS[1:])]

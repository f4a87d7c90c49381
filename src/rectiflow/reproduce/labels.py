"""What tables and plots call the students that are reflowed."""

from __future__ import annotations

from rectiflow.reproduce.instaflow import SEEDS

OPTIONS = {
    "2rf-start-exact": "exact start",
    "2rf-time-u-shaped": "u-shaped times",
    "2rf-time-logit-normal": "logit-normal times",
    "2rf-time-grid": "only the time of one step",
    "2rf-loss-huber": "pseudo-Huber",
    "2rf-loss-lpips-huber": "LPIPS-Huber in emoji-clip's features, a quarter of the samples",
    "2rf-curation-longest": "without the tenth of longest pairs",
    "2rf-curation-flip": "half of the pairs mirrored",
    "2rf-coupling-annealed": "annealed from independent noise",
    "2rf-optimizer-muon": "Muon for the hidden matrices",
    "online": "pairs made on the fly, a quarter of the samples",
}
"""The paper's reflow with one setting changed, beside `paper-2rf-0`."""
REFLOWS = {
    **{f"paper-2rf-{seed}": f"the paper's recipe (seed {seed})" for seed in SEEDS},
    **OPTIONS,
    "2rf-0": "exact start, u-shaped times",
    "emoji-2rf": "as shipped",
}
"""All that are compared."""

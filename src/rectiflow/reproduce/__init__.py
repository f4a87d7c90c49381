"""A paper's claims, measured: what to train, what to measure, and how it went."""

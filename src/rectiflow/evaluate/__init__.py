"""Benchmarks and metrics: the judge of emoji pictures and the suites of `rectiflow evaluate`."""

from __future__ import annotations

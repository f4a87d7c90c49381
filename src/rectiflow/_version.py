"""The version, in one place: read by the build, by the package and by what it writes."""

from __future__ import annotations

__version__ = "0.1.0"

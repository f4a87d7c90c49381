"""The fronts of the package: thin, no algorithm is written here.

Nothing in this room imports torch, diffusers or transformers before a command needs it.
"""

from __future__ import annotations

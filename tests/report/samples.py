"""Reports made of small drawn pictures, and a reader of the pages they become."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rectiflow.report import Alignment, EditEntry, EditReport, Noise

PROMPT = "two red apples on a blue background"
TARGET = "two green pears on a blue background"
ALIGNED = Alignment(PROMPT.split(), TARGET.split(), [(0, 0), (3, 3), (4, 4), (5, 5), (6, 6)])


def drawing(seed: int, size: tuple[int, int] = (64, 64)) -> Image.Image:
    """A smooth coloured picture, ``size`` as (width, height)."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return small.resize(size, Image.Resampling.BICUBIC)


def entry(seed: int = 1, size: tuple[int, int] = (64, 64), **changes: Any) -> EditEntry:
    mask = np.zeros((size[1], size[0]), dtype=bool)
    mask[2:9, 3:12] = True
    filled: dict[str, Any] = {
        "prompt": TARGET,
        "image": drawing(seed, size),
        "target": drawing(seed + 100, size),
        "mask": mask,
        "alignment": ALIGNED,
        "metrics": {"inside_mse": 0.0123},
        "nfe": 32,
        "seconds": 1.25,
    }
    return EditEntry(**filled | changes)


def example(
    edits: int | list[EditEntry] = 1, size: tuple[int, int] = (64, 64), **changes: Any
) -> EditReport:
    steps = 15
    if isinstance(edits, int):
        edits = [entry(seed, size) for seed in range(1, edits + 1)]
    filled: dict[str, Any] = {
        "title": "Two apples",
        "model": "emoji-sd3",
        "preset": "exact",
        "source": drawing(0, size),
        "source_prompt": PROMPT,
        "reconstruction": drawing(0, size),
        "codec": drawing(0, size),
        "edits": edits,
        "settings": {"num_inference_steps": steps, "compensate": "both", "nested": {"a": (1, 2)}},
        "command": 'rectiflow edit apples.png --from "two red apples" --to "two pears"',
        "times": np.linspace(0, 1, steps + 1).tolist(),
        "residuals": np.geomspace(1e-6, 1e-2, steps).tolist(),
        "compensation": np.linspace(0.01, 0.06, steps).tolist(),
        "noise": Noise(norm=1.01, kurtosis=0.5, autocorrelation=0.4),
        "nfe_inversion": 42,
        "nfe_editing": 32 * len(edits),
        "seconds_inversion": 2.0,
        "seconds": 6.5,
        "environment": {"date": "2026-11-20", "seed": 7},
    }
    return EditReport(**filled | changes)


@dataclass
class Page(HTMLParser):
    """The elements of a page with their attributes, and its text."""

    source: str
    elements: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    open: list[str] = field(default_factory=list)

    VOID = frozenset({"img", "input", "meta", "link", "br", "use", "image", "path", "rect"})

    def __post_init__(self) -> None:
        super().__init__()
        self.feed(self.source)
        self.close()

    @classmethod
    def read(cls, path: Path) -> Page:
        return cls(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        if self.open[-1:] not in (["script"], ["style"]):
            self.pieces.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.pieces).split())

    def all(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        return [
            found
            for name, found in self.elements
            if name == tag and all(found.get(key) == value for key, value in attributes.items())
        ]

    def having(self, name: str) -> list[dict[str, str | None]]:
        """The elements of the class ``name``."""
        return [found for _, found in self.elements if name in (found.get("class") or "").split()]


def decoded(uri: str | None) -> Image.Image:
    assert uri is not None
    start, _, data = uri.partition(",")
    assert start == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))

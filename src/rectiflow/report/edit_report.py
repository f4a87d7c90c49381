"""What a report of an edit is made of, in plain data, and the two pages it can become."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rectiflow.errors import InputError
from rectiflow.files import write_whole


@dataclass(frozen=True)
class Alignment:
    """Which tokens of two prompts stand for each other.

    Raises:
        InputError: a pair points outside the tokens, or two pairs cross.
    """

    source: Sequence[str]
    """The source prompt's tokens in reading order, without padding, as they should be shown."""
    target: Sequence[str]
    """The target prompt's."""
    kept: Sequence[tuple[int, int]]
    """(source index, target index) of each unchanged token; both ascend."""
    name: str = ""
    """The tokenizer, for example ``CLIP``."""

    def __post_init__(self) -> None:
        before = (-1, -1)
        for i, j in self.kept:
            if not (before[0] < i < len(self.source) and before[1] < j < len(self.target)):
                raise InputError(
                    f"the token pair ({i}, {j}) is outside the prompts or crosses the pair "
                    f"before it; `kept` must ascend in both"
                )
            before = (i, j)


@dataclass(frozen=True)
class Noise:
    """How far the inverted noise is from N(0, I), where the three are 1, 0 and 0."""

    norm: float
    """‖x‖ / √d."""
    kurtosis: float
    """Excess kurtosis."""
    autocorrelation: float
    """Of neighbouring values, in [-1, 1]."""
    usual: Mapping[str, tuple[float, float]] | None = None
    """From and to, by these names: of images that the model knows. What has no range here is not
    judged; None if nothing is known of the model."""


@dataclass(frozen=True, eq=False, kw_only=True)
class EditEntry:
    """One edit of the source."""

    prompt: str
    image: Image.Image
    target: Image.Image | None = None
    """The true answer, where it is known."""
    mask: NDArray[np.bool_] | None = None
    """[H, W], true where the picture may change; outlined on the difference map."""
    alignment: Alignment | None = None
    metrics: Mapping[str, object] = field(default_factory=dict)
    """Further figures by name, shown as they are."""
    nfe: int | None = None
    """Network samples of this edit alone."""
    seconds: float | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class EditReport:
    """Everything that one report shows. Pictures are of one size; what is unknown is left out.

    Raises:
        InputError: there is no edit, or pictures or per-step figures do not fit together.
    """

    title: str
    model: str
    preset: str
    source: Image.Image
    edits: Sequence[EditEntry]
    source_prompt: str | None = None
    """None or empty: it was not given, and the page says so."""
    reconstruction: Image.Image | None = None
    """The source replayed from its noise, if that was asked for."""
    uncompensated: Image.Image | None = None
    """The same without the velocity compensation."""
    codec: Image.Image | None = None
    """The source encoded and decoded: the most that any reconstruction can reach."""
    settings: Mapping[str, object] = field(default_factory=dict)
    command: str = ""
    """What makes this report again."""
    times: Sequence[float] = ()
    """The grid t_0 < … < t_N, 0 noise and 1 image."""
    residuals: Sequence[float] = ()
    """[N] relative residual of each inversion step; empty where the scheme does not know it."""
    compensation: Sequence[float] = ()
    """[N] ‖c_i‖ / ‖v_i‖ of each step of the reconstruction."""
    noise: Noise | None = None
    nfe_inversion: int = 0
    nfe_editing: int = 0
    nfe_reconstruction: int = 0
    seconds_inversion: float | None = None
    seconds: float | None = None
    """Of everything."""
    warnings: Sequence[str] = ()
    environment: Mapping[str, object] = field(default_factory=dict)
    """Date, seed, versions, weight hash, device: what a reader needs to believe the rest."""
    kind: str = ""
    """The kind of edit, for a gallery: ``background``, ``count``, …"""

    def __post_init__(self) -> None:
        if not self.edits:
            raise InputError("a report needs at least one edit")
        pictures = {"reconstruction": self.reconstruction, "codec": self.codec}
        pictures["uncompensated reconstruction"] = self.uncompensated
        for number, edit in enumerate(self.edits, start=1):
            pictures |= {f"edit {number}": edit.image, f"target {number}": edit.target}
            shape = (self.source.height, self.source.width)
            if edit.mask is not None and edit.mask.shape != shape:
                raise InputError(
                    f"the mask of edit {number} is {edit.mask.shape}, the source {shape}; "
                    f"resize it to the source"
                )
        for name, picture in pictures.items():
            if picture is not None and picture.size != self.source.size:
                raise InputError(
                    f"the {name} is {picture.size}, the source {self.source.size}; "
                    f"bring it back to the source's size"
                )
        steps = len(self.times) - 1
        for name, values in (("residuals", self.residuals), ("compensation", self.compensation)):
            if len(values) and len(values) != steps:
                raise InputError(f"{len(values)} {name} for a grid of {max(steps, 0)} steps")

    @property
    def nfe(self) -> int:
        """Network samples of everything."""
        return self.nfe_inversion + self.nfe_editing + self.nfe_reconstruction


def write_edit_report(report: EditReport, path: str | PathLike[str]) -> Path:
    """Write one report as one HTML file that needs nothing else, and return its path."""
    from rectiflow.report.html import edit_page  # jinja2 and matplotlib, only when writing

    return _write(edit_page(report), path)


def write_gallery(
    reports: Sequence[EditReport],
    path: str | PathLike[str],
    *,
    title: str = "Edits",
    introduction: str = "",
    links: Sequence[str | None] = (),
    command: str = "",
    environment: Mapping[str, object] | None = None,
) -> Path:
    """Write many reports as one HTML file that needs nothing else, and return its path.

    Args:
        reports: One case each; every edit of each is shown beside its true target, if known.
        path: The file to write.
        title: The heading.
        introduction: A sentence or two below it.
        links: One for each report, if any: where its own page is, relative to `path`.
        command: What makes this page again.
        environment: Date, versions, device.

    Raises:
        InputError: there are no reports, or `links` has another length.
    """
    from rectiflow.report.html import gallery_page

    if not reports:
        raise InputError("a gallery needs at least one report")
    if links and len(links) != len(reports):
        raise InputError(f"{len(links)} links for {len(reports)} reports; give one for each")
    page = gallery_page(
        reports,
        title=title,
        introduction=introduction,
        links=links or [None] * len(reports),
        command=command,
        environment=environment or {},
    )
    return _write(page, path)


def _write(page: str, path: str | PathLike[str]) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, page)
    return path

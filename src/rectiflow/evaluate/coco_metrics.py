"""The COCO protocol's figures: FID, Fréchet distance in a CLIP's features, CLIP score.

Both piles of pictures, the references and those drawn, go through one resizer (`resize`) to the
size of the network that looks at them. A metric whose network is not given is left out by name,
never replaced.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import PIL
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from rectiflow.errors import InputError
from rectiflow.evaluate import pie_bench_metrics
from rectiflow.evaluate.clip_features import clip_scores, image_features
from rectiflow.evaluate.coco import Run
from rectiflow.evaluate.emoji_models import mean_interval
from rectiflow.evaluate.frechet import GaussianStatistics, frechet_estimate
from rectiflow.files import write_csv
from rectiflow.guarded import read_json
from rectiflow.models.picture import load_image
from rectiflow.models.weights import weight_hash
from rectiflow.progress import progress
from rectiflow.report import read_png

if TYPE_CHECKING:
    from rectiflow.evaluate.emoji_models import Clip

BATCH = 50
FEWEST = 3
"""Pictures that a Fréchet distance needs."""
INCEPTION_FILE = "torch-fidelity's weights-inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
"""Of the file that torch-fidelity and pytorch-fid publish; with any other it is no FID."""
RESIZER = {
    "crop": "the largest square in the middle",
    "library": f"Pillow {PIL.__version__}",
    "filter": "bicubic",
    "antialias": True,
    "computed_in": "float32",
    "rounded_to": "8 bits",
}
"""What `resize` does, as figures state it."""


class Inception(Protocol):
    """torchmetrics' Inception: bytes ``[B, 3, 299, 299]`` to features ``[B, 2048]``."""

    def __call__(self, pixels: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Networks:
    """The networks that are at hand; None leaves their metrics out."""

    inception: Inception | None = None
    inception_size: int = 299
    """Side of the pictures that it takes."""
    clip: Clip | None = None
    clip_name: str = ""
    device: torch.device | None = None
    """Where Inception computes; the CPU when None."""

    @property
    def missing(self) -> dict[str, str]:
        """The metrics that are left out, and why."""
        lacking = {}
        if self.inception is None:
            lacking["FID"] = "needs --inception-weights"
        if self.clip is None:
            lacking["Fréchet distance in CLIP features"] = "needs --clip"
            lacking["CLIP score"] = "needs --clip"
        return lacking


def resize(image: Image.Image, size: int) -> Image.Image:
    """A picture as a network sees it: cropped to the square in the middle, and resized.

    Bicubic and antialiased, each channel in float32, clamped: clean-fid's way (Parmar et al.,
    arXiv 2104.11222), but rounded to 8 bits at the end, which is what the networks here take.

    Args:
        image: RGB of any size.
        size: The side of the result, in pixels.
    """
    side = min(image.size)
    left, top = ((length - side) // 2 for length in image.size)
    square = image.crop((left, top, left + side, top + side))
    if side == size:
        return square
    bands = [
        np.asarray(band.convert("F").resize((size, size), Image.Resampling.BICUBIC))
        for band in square.split()
    ]
    return Image.fromarray(np.stack(bands, axis=2).clip(0, 255).round().astype(np.uint8))


def load_networks(
    inception_weights: Path | None = None,
    clip: str | None = None,
    device: torch.device | None = None,
) -> Networks:
    """Load the networks that the user supplies, in float32.

    Args:
        inception_weights: torch-fidelity's file of the Inception of 2015.
        clip: a folder or hub id of a `CLIPModel`, or ``emoji-clip``.
        device: where they compute; the CPU when None.

    Raises:
        InputError: one cannot be loaded.
    """
    device = device or torch.device("cpu")
    found: dict[str, Any] = {}
    if inception_weights is not None:
        found["inception"] = load_inception(inception_weights).to(device)
    if clip is not None:
        loaded = pie_bench_metrics.load_networks(clip=clip, device=device).clip
        found |= {"clip": loaded, "clip_name": clip}
    return Networks(**found, device=device)


def load_inception(weights: Path) -> Any:
    """Torchmetrics' Inception with the weights that the FID is defined by.

    torch-fidelity unpickles the file, which runs what is in it: so it must be that very file.

    Raises:
        InputError: it is another file, or a package is missing.
    """
    try:
        with weights.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{weights} cannot be read: give {INCEPTION_FILE}") from error
    if found != INCEPTION_SHA256:
        raise InputError(
            f"{weights} (SHA-256 {found[:8]}…) is not the Inception of the FID: give "
            f"{INCEPTION_FILE}, SHA-256 {INCEPTION_SHA256[:8]}…"
        )
    try:
        from torchmetrics.image.fid import NoTrainInceptionV3

        return NoTrainInceptionV3("inception-v3-compat", ["2048"], str(weights))
    except ModuleNotFoundError as error:
        raise InputError(
            "FID needs the packages torch-fidelity and torchvision: install both, torchvision in "
            "the build of your PyTorch, or leave out --inception-weights"
        ) from error


def measure(run: Run, networks: Networks) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Compute all metrics of a run whose pictures are complete.

    The statistics of the references are left in the run's folder.

    Returns:
        The figures, ``{"split", "selection", "n", "ids_hash", "captions_hash", "resizer",
        "metrics", "left_out", "nfe"}`` with settings.json's beside them, and a row per picture.

    Raises:
        InputError: a picture is damaged or was not written by this evaluation, or there are fewer
            than three.
    """
    images = run.data.images
    made = [_made(run.file(image)) for image in images]
    rows: list[dict[str, Any]] = [
        {"id": image.id, "seed": record["seed"], "caption": image.caption, "nfe": record["nfe"]}
        for image, record in zip(images, made, strict=True)
    ]
    references, drawn = [image.picture for image in images], [run.file(image) for image in images]
    metrics: dict[str, dict[str, Any]] = {}
    if networks.inception is not None:
        piles = [_inception_features(networks, files) for files in (references, drawn)]
        metrics["fid"] = {
            "title": "FID",
            **_frechet(run, "fid", *piles),
            "features": "inception-v3-compat, 2048",
            "weights_hash": INCEPTION_SHA256,
            "size": networks.inception_size,
        }
    if networks.clip is not None:
        captions = [image.caption for image in images]
        piles = [_clip_features(networks.clip, files) for files in (references, drawn)]
        about = {
            "clip": networks.clip_name,
            "weights_hash": weight_hash({"clip": networks.clip.model}),
            "size": networks.clip.model.config.vision_config.image_size,
        }
        known, scores = (clip_scores(networks.clip, pile, captions) for pile in piles)
        metrics["frechet_clip"] = {
            "title": f"Fréchet distance in features of {networks.clip_name}",
            **_frechet(run, "clip", *piles),
            **about,
        }
        metrics["clip_score"] = {
            "title": f"CLIP score (cosine, {networks.clip_name})",
            "value": float(scores.mean()),
            "interval": mean_interval(scores.tolist()),
            "references": float(known.mean()),
            **about,
        }
        for row, score in zip(rows, scores.tolist(), strict=True):
            row["clip_score"] = score
    figures = {
        **read_json(run.settings_file),
        "split": run.data.split,
        "selection": run.data.selection,
        "n": len(rows),
        "ids_hash": run.data.ids_hash,
        "captions_hash": run.data.captions_hash,
        "resizer": RESIZER,
        "metrics": metrics,
        "left_out": networks.missing,
        "nfe": float(np.mean([row["nfe"] for row in rows])),
    }
    return figures, rows


def write_tables(run: Run, figures: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write ``per-image.csv`` and ``figures.csv``, a row per metric, into the run's folder."""
    columns = ["metric", "value", "n", "standard_error", "low", "high", "references"]
    columns += ["caution", "left_out"]
    table: list[dict[str, Any]] = []
    for name, found in figures["metrics"].items():
        low, high = found.get("interval", (None, None))
        row = {
            key: found[key]
            for key in ("value", "standard_error", "references", "caution")
            if key in found
        }
        table.append({"metric": name, "n": figures["n"], "low": low, "high": high, **row})
    table += [{"metric": name, "left_out": why} for name, why in figures["left_out"].items()]
    write_csv(run.output / "per-image.csv", rows)
    write_csv(run.output / "figures.csv", table, columns)


def _frechet(
    run: Run, name: str, references: NDArray[np.float32], drawn: NDArray[np.float32]
) -> dict[str, Any]:
    reference = GaussianStatistics.of(references)
    file = run.output / f"reference-{name}.safetensors"
    reference.save(file)
    found = frechet_estimate(drawn, reference)
    return {
        "value": found.value,
        "standard_error": found.standard_error,
        "dimensions": drawn.shape[1],
        **({} if found.caution is None else {"caution": found.caution}),
        "reference_hash": reference.digest(),
        "reference_file": file.name,
    }


@torch.no_grad()
def _inception_features(networks: Networks, files: Sequence[Path]) -> NDArray[np.float32]:
    assert networks.inception is not None
    found = []
    for batch in _batches(files, networks.inception_size, "Inception"):
        pixels = torch.from_numpy(batch).permute(0, 3, 1, 2).to(networks.device)
        found.append(networks.inception(pixels).float().cpu().numpy())
    return np.concatenate(found)


def _clip_features(clip: Clip, files: Sequence[Path]) -> NDArray[np.float32]:
    size = clip.model.config.vision_config.image_size
    return np.concatenate([image_features(clip, batch) for batch in _batches(files, size, "CLIP")])


def _batches(files: Sequence[Path], size: int, what: str) -> Iterator[NDArray[np.uint8]]:
    """Pictures resized, uint8 ``[B, size, size, 3]``."""
    starts = range(0, len(files), BATCH)
    for start in progress(starts, desc=what, unit=" batches", leave=False):
        pictures = [resize(load_image(file), size) for file in files[start : start + BATCH]]
        yield np.stack([np.asarray(picture) for picture in pictures])


def _made(file: Path) -> dict[str, Any]:
    made = read_png(file)
    if made.get("command") != "evaluate coco" or not {"nfe", "seed"} <= set(made):
        raise InputError(f"{file} was not written by this evaluation: delete it and run again")
    return made

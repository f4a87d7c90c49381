"""PIE-Bench's metrics, as its authors compute them (quirk) and as one would expect (corrected).

============================  =================================  =================================
metric                        quirk                              corrected
============================  =================================  =================================
structure_distance            DINO is given pixels far out of    pixels in range, antialiased
                              range, not antialiased
background_psnr, _mse, _ssim  over all pixels, the edited ones   mean over the other pixels
                              black in both pictures
background_lpips              edited pixels at −1 in both        the same
clip_whole, clip_edited       the second with all but the        the same
                              edited pixels black
============================  =================================  =================================

A picture whose mask covers all of it has no background, and is left out of those means.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from rectiflow.errors import InputError
from rectiflow.evaluate import metrics
from rectiflow.evaluate.structure import structure_distance
from rectiflow.models.libraries import quiet_libraries
from rectiflow.models.load import WEIGHTS
from rectiflow.models.lpips import Lpips, load_lpips

if TYPE_CHECKING:
    from rectiflow.evaluate.emoji_models import Clip

VARIANTS = ("quirk", "corrected")
DINO_METRICS = ("structure_distance",)
BACKGROUND_METRICS = ("background_psnr", "background_mse", "background_ssim")
LPIPS_METRICS = ("background_lpips",)
CLIP_METRICS = ("clip_whole", "clip_edited")

Scores = dict[str, dict[str, float]]
"""Variant → metric → value; NaN where a picture has no background."""


@dataclass(frozen=True)
class Networks:
    """The networks that are at hand; None leaves their metrics out."""

    dino: Any = None
    """A `ViTModel` of transformers."""
    clip: Clip | None = None
    lpips: Lpips | None = None

    @property
    def missing(self) -> list[str]:
        """What is not at hand, with the metrics that are therefore left out."""
        lacking = []
        if self.dino is None:
            lacking.append("DINO ViT-B/8 (structure distance)")
        if self.lpips is None:
            lacking.append("LPIPS-squeeze weights (background LPIPS)")
        if self.clip is None:
            lacking.append("CLIP ViT-L/14 (CLIP scores)")
        return lacking

    @property
    def metrics(self) -> list[str]:
        """The metrics that can be computed, in the order of reports."""
        return [
            *(DINO_METRICS if self.dino is not None else ()),
            *BACKGROUND_METRICS,
            *(LPIPS_METRICS if self.lpips is not None else ()),
            *(CLIP_METRICS if self.clip is not None else ()),
        ]


def load_networks(
    dino: str | None = None,
    clip: str | None = None,
    lpips: Path | None = None,
    device: torch.device | None = None,
) -> Networks:
    """Load the networks that the user supplies, in float32.

    Args:
        dino: a folder or hub id of a `ViTModel`: ``facebook/dino-vitb8`` for published figures.
        clip: a folder or hub id of a `CLIPModel` (``openai/clip-vit-large-patch14``), or
            ``emoji-clip``.
        lpips: a file for `load_lpips`.
        device: where they compute; the CPU when None.

    Raises:
        InputError: one cannot be loaded.
    """
    device = device or torch.device("cpu")
    return Networks(
        dino=None if dino is None else _load_dino(dino).to(device),
        clip=None if clip is None else _load_clip(clip, device),
        lpips=None if lpips is None else load_lpips(lpips).to(device),
    )


def score(
    networks: Networks,
    source: Tensor,
    result: Tensor,
    mask: Tensor,
    prompt: str,
    variants: Sequence[str] = VARIANTS,
) -> Scores:
    """All metrics of one result.

    Args:
        networks: those at hand.
        source: ``[1, 3, H, W]`` in [0, 1].
        result: the same.
        mask: bool ``[1, 1, H, W]``, True where the edit belongs.
        prompt: the target's.
        variants: of `VARIANTS`.
    """
    # Those that have no corrected variant are computed once.
    alike = _background_lpips(networks, source, result, mask)
    alike |= _clip_scores(networks, result, mask, prompt)
    scores = {}
    for variant in variants:
        quirk = variant == "quirk"
        found = _background(source, result, mask, quirk=quirk) | alike
        if networks.dino is not None:
            distance = structure_distance(networks.dino, source, result, quirk=quirk)
            found["structure_distance"] = distance.item()
        scores[variant] = {name: found[name] for name in networks.metrics}
    return scores


def mean(values: Sequence[float]) -> dict[str, float | int | None]:
    """The mean of those that are numbers, and how many they are."""
    known = [value for value in values if not np.isnan(value)]
    return {"mean": float(np.mean(known)) if known else None, "n": len(known)}


def summarise(scores: Sequence[Scores]) -> dict[str, dict[str, Mapping[str, Any]]]:
    """Variant → metric → mean and n over pictures; at least one."""
    return {
        variant: {name: mean([each[variant][name] for each in scores]) for name in found}
        for variant, found in scores[0].items()
    }


def _background(source: Tensor, result: Tensor, mask: Tensor, *, quirk: bool) -> dict[str, float]:
    if mask.all():
        return dict.fromkeys(BACKGROUND_METRICS, float("nan"))
    if quirk:
        source, result = source * ~mask, result * ~mask
        values = [f(result, source) for f in (metrics.psnr, metrics.mse, metrics.ssim)]
    else:
        values = [
            metrics.masked_psnr(result, source, mask),
            metrics.masked_mse(result, source, mask, inside=False),
            metrics.masked_ssim(result, source, mask),
        ]
    return {name: v.item() for name, v in zip(BACKGROUND_METRICS, values, strict=True)}


def _background_lpips(
    networks: Networks, source: Tensor, result: Tensor, mask: Tensor
) -> dict[str, float]:
    if networks.lpips is None:
        return {}
    if mask.all():
        return {"background_lpips": float("nan")}
    return {"background_lpips": networks.lpips(result * ~mask, source * ~mask).item()}


def _clip_scores(networks: Networks, result: Tensor, mask: Tensor, prompt: str) -> dict[str, float]:
    if networks.clip is None:
        return {}
    both = torch.cat([result, result * mask])
    whole, edited = metrics.clip_score(networks.clip, both, [prompt, prompt]).tolist()
    return {"clip_whole": whole, "clip_edited": edited}


def _load_dino(name: str) -> Any:
    from transformers import ViTModel

    return _pretrained(ViTModel, name, "DINO", add_pooling_layer=False)


def _load_clip(name: str, device: torch.device) -> Clip:
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    from rectiflow.evaluate.emoji_models import Clip

    source = str(WEIGHTS / name) if name == "emoji-clip" else name
    model = _pretrained(CLIPModel, source, "CLIP").to(device)
    try:
        with quiet_libraries():
            tokenizer = CLIPTokenizer.from_pretrained(source)
            processor = CLIPImageProcessorPil.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise InputError(
            f"the CLIP {name} lacks its tokenizer or its image processor: give a complete folder"
        ) from error
    return Clip(model, tokenizer, processor)


def _pretrained(kind: Any, source: str, what: str, **options: Any) -> Any:
    """A network of transformers with all of its weights."""
    from safetensors import SafetensorError

    try:
        with quiet_libraries():
            network, info = kind.from_pretrained(
                source, dtype=torch.float32, output_loading_info=True, **options
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(
            f"the {what} {source} cannot be loaded: give a folder that save_pretrained wrote, or "
            "the id of one on the hub"
        ) from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])[0]
        raise InputError(
            f"the {what} {source} is incomplete or of another kind than {kind.__name__} "
            f"({missing} is missing): give another folder or hub id"
        )
    return network.eval()

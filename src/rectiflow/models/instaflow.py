"""InstaFlow's own checkpoints, whose network predicts data - noise at the time 1000 (1 - t).

Liu et al. 2023, arXiv 2309.06380, made pipelines of Stable Diffusion's parts whose U-Net is asked
at 1000 (1 - i / N) in step i of N and is added as it is, x + v / N. Two things differ from what the
rest of the family does, and from what stock diffusers can do:

- the sign, which is in the last convolution, so that it is turned around there once and for all;
- the first step's time, 1000, where stock schedulers have integers of at most 999, rounded down.
  `InstaFlowModel` asks as the authors did, at times neither rounded nor cut, so its results are
  those of their own pipeline. What `import_instaflow` writes is a stock folder, which stock
  diffusers and we alike ask at 999: the same weights at a time that is a thousandth off.

Nothing in their files tells of it but the name of the pipeline, `RectifiedFlowPipeline`; a copy
that was saved as a `StableDiffusionPipeline` has to be loaded with ``convention="instaflow"``.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from rectiflow.arguments import checked
from rectiflow.checksums import write_checksums
from rectiflow.errors import InputError
from rectiflow.files import readable_alike, unfinished_folder
from rectiflow.flow.device import time_for
from rectiflow.flow.grid import make_grid
from rectiflow.models.folder import load_in_float32
from rectiflow.models.metadata import Metadata, write_metadata
from rectiflow.models.prompts import Conditioning
from rectiflow.models.schedulers import rectified_scheduler
from rectiflow.models.sd import SDModel

PIPELINE = "RectifiedFlowPipeline"
"""What the authors' folders say they are: a class of theirs, with Stable Diffusion's parts."""

ONE_STEP = "instaflow_0_9b"
"""In the name of the checkpoint that is for one step; the other one is a 2-rectified flow."""


class InstaFlowModel(SDModel):
    """Official weights, `to_diffusers_sign` done, asked exactly as the authors' pipeline asks.

    To train from them, or to give them to stock diffusers, take what `import_instaflow` writes.
    """

    family: ClassVar[str] = "sd"
    convention: ClassVar[str | None] = "instaflow"

    @property
    def default_grid(self) -> str:
        """The authors': t = i / N."""
        return "uniform"

    def student_grid(self, num_inference_steps: int) -> Tensor:
        """The grid t = i / N, float32 [N + 1] on the CPU."""
        return make_grid("uniform", num_inference_steps)

    def differentiable_velocity(self, x: Tensor, t: Tensor | float, cond: Conditioning) -> Tensor:
        """`v = -u(x, 1000 (1 - t))` in float32, or in float64 if `x` is."""
        x = x if x.dtype == torch.float64 else x.float()
        time = time_for(t, x, x.dtype)
        return -self.predict(x, self.num_train_timesteps * (1 - time), cond)


def to_diffusers_sign(pipeline: Any, name: str) -> None:
    """Let official weights predict noise - data, and their pipeline know it; in place.

    Args:
        pipeline: A `StableDiffusionPipeline` with official weights; LoRAs may be in it.
        name: The model's, for messages.

    Raises:
        InputError: The pipeline says that its network predicts noise - data already.
    """
    if pipeline.scheduler.config.get("prediction_type") == "flow_prediction":
        raise InputError(
            f"{name} is a rectified flow in diffusers' convention already: leave out "
            "convention=instaflow"
        )
    with torch.no_grad():
        for key, weight in pipeline.unet.conv_out.named_parameters():
            if "lora_A" not in key:  # of a LoRA's two matrices, which are multiplied, one is enough
                weight.neg_()
    pipeline.scheduler = rectified_scheduler()


def official_metadata(metadata: Metadata, name: str) -> Metadata:
    """What is known of the authors' two checkpoints, where a folder itself says nothing."""
    if metadata.student_steps is None and ONE_STEP in name.lower():
        return metadata.model_copy(update={"student_steps": (1,)})
    return metadata


@checked
def import_instaflow(
    source: str | Path,
    folder: str | Path,
    *,
    student_steps: Sequence[int] = (),
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write official weights as a folder of ours, which stock diffusers loads as well.

    Args:
        source: A folder with official weights, or an id on the hub.
        folder: New or empty.
        student_steps: The numbers of steps they are made for; known of the authors' own ids.
        dtype: Of network and text encoder.

    Raises:
        InputError: `source` cannot be loaded or is not official, or `folder` has something in it.
    """
    from rectiflow.models.load import load

    target = Path(folder).expanduser()
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise InputError(f"{target} is there already: name a new folder")
    model = load(source, dtype=dtype, device="cpu", convention="instaflow")
    metadata = model.metadata.model_copy(update={"family": model.family})
    if student_steps:
        metadata = metadata.model_copy(update={"student_steps": tuple(student_steps)})
    temporary = unfinished_folder(target)
    try:
        model.pipeline.save_pretrained(temporary)
        load_in_float32(temporary)
        write_metadata(metadata, temporary)
        write_checksums(temporary)
        readable_alike(temporary)
        if target.is_dir():
            target.rmdir()
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)

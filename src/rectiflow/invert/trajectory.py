"""An inversion: the whole path from an image to its noise, kept, saved, and run forward again."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rectiflow.errors import InputError, WorkError
from rectiflow.flow.grid import make_grid
from rectiflow.flow.measure import NoiseStatistics, noise_statistics
from rectiflow.flow.solver import integrate
from rectiflow.invert.euler import euler_inversion
from rectiflow.invert.fixed_point import fixed_point_inversion
from rectiflow.invert.presets import Preset, get_preset
from rectiflow.invert.rows import RowwiseGuidedVelocity
from rectiflow.models.base import FlowModel, GuidedVelocity
from rectiflow.models.generate import generate_latents, initial_noise
from rectiflow.models.images import Restore, fit, load_image

FORMAT = 1


@dataclass(frozen=True)
class Reconstruction:
    """What running an inversion forward again gives."""

    latents: Tensor
    """``[1, C, h, w]``, float32."""
    image: Image.Image
    """Decoded, at the source's size."""
    max_abs_latent: float
    """Largest difference from the image's latents."""
    compensation: Tensor
    """Size of the correction in each step relative to the velocity: ``[N]``."""
    nfe: int


@dataclass(frozen=True, eq=False)
class Inversion:
    """The path from noise (index 0) to an image (last index) under a source prompt."""

    model: FlowModel = field(repr=False)
    trajectory: Tensor = field(repr=False)
    """States at the grid's times, float32 ``[N + 1, 1, C, h, w]``."""
    grid: Tensor = field(repr=False)
    """Rising times, float32 ``[N + 1]``."""
    source_prompt: str
    preset: Preset
    restore: Restore
    """Where the picture lies in the model's, and the way back to its own size."""
    residuals: tuple[float, ...] = field(repr=False)
    """How far each step is from its exact inverse, relative to the state; NaN where unknown."""
    nfe: int
    """Network samples it cost."""
    seconds: float
    seed: int | None = None
    """The seed of a generated source; None for a real image."""

    @property
    def noise(self) -> Tensor:
        """The noise end of the path, ``[1, C, h, w]``."""
        return self.trajectory[0]

    @property
    def latents(self) -> Tensor:
        """The image end of the path, ``[1, C, h, w]``."""
        return self.trajectory[-1]

    @property
    def noise_statistics(self) -> NoiseStatistics:
        """How far the noise is from N(0, I)."""
        return noise_statistics(self.noise)

    @property
    def residual(self) -> float:
        """The largest residual of any step; NaN where it is unknown."""
        return max(self.residuals)

    def images(self, latents: Tensor) -> list[Image.Image]:
        """Decode latents ``[B, C, h, w]`` at the source's size."""
        return self.restore(self.model.decode(latents))

    @torch.no_grad()
    def reconstruct(self, compensate: bool = True) -> Reconstruction:
        """Generate the image again from its noise under the source prompt.

        Args:
            compensate: add to every velocity what returns the stored path (stage II of FTEdit,
                equation 9); exact up to rounding, however bad the inversion was. Without it the
                result shows how good the inversion is.
        """
        cond = self.model.encode_prompt([self.source_prompt])
        guidance = self.preset.guidance_scale if self.seed is not None else 1.0
        velocity = GuidedVelocity(self.model, cond, None, guidance)
        sizes = []

        def compensated(x: Tensor, t: Tensor, step: int) -> Tensor:
            v = velocity(x, t, step)
            h = self.grid[step + 1] - self.grid[step]
            correction = (self.trajectory[step + 1] - x) / h - v
            sizes.append((correction.norm() / v.norm().clamp_min(1e-12)).item())
            return v + correction if compensate else v

        x = integrate(compensated, self.noise, self.grid).x
        return Reconstruction(
            latents=x,
            image=self.images(x)[0],
            max_abs_latent=(x - self.latents).abs().max().item(),
            compensation=torch.tensor(sizes),
            nfe=len(sizes) * velocity.samples_per_row,
        )

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file: trajectory and grid, and all else as one JSON key."""
        path = Path(path)
        about = {
            "format": FORMAT,
            "model": self.model.name,
            "weight_hash": self.model.weight_hash,
            "source_prompt": self.source_prompt,
            "preset": dataclasses.asdict(self.preset),
            "restore": dataclasses.asdict(self.restore),
            # JSON has no NaN: an unknown residual is null.
            "residuals": [None if math.isnan(r) else r for r in self.residuals],
            "nfe": self.nfe,
            "seconds": self.seconds,
            "seed": self.seed,
            "noise": dataclasses.asdict(self.noise_statistics),
        }
        tensors = {"trajectory": self.trajectory.cpu().contiguous(), "grid": self.grid.cpu()}
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        save_file(tensors, temporary, {"rectiflow": json.dumps(about)})
        os.replace(temporary, path)
        return path

    @classmethod
    def load(cls, path: str | Path, model: FlowModel) -> Inversion:
        """Read what `save` wrote, for the model that made it.

        Raises:
            InputError: no such file, not an inversion, or another model's.
        """
        try:
            with safe_open(path, "pt") as file:
                about: dict[str, Any] = json.loads((file.metadata() or {})["rectiflow"])
                version = about["format"]
                trajectory, grid = file.get_tensor("trajectory"), file.get_tensor("grid")
        except FileNotFoundError:
            raise InputError(f"no inversion at {path}: make one with `rectiflow invert`") from None
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            raise InputError(f"{path} is not a saved inversion") from None
        if version != FORMAT:
            raise InputError(
                f"{path} has format {version} and this version of rectiflow reads {FORMAT}: "
                "invert again"
            )
        if about["weight_hash"] != model.weight_hash:
            raise InputError(
                f"{path} was made with {about['model']} (weights {about['weight_hash'][:12]}) and "
                f"not with {model.name} (weights {model.weight_hash[:12]}): load that model in the "
                "same dtype, or invert again"
            )
        try:
            preset = Preset(**about["preset"] | {"features": tuple(about["preset"]["features"])})
        except TypeError:
            raise InputError(f"{path} holds settings that this version does not know") from None
        restore = {name: tuple(value) for name, value in about["restore"].items()}
        return cls(
            model=model,
            trajectory=trajectory.to(model.device),
            grid=grid.to(model.device),
            source_prompt=about["source_prompt"],
            preset=preset,
            restore=Restore(**restore),
            residuals=tuple(math.nan if r is None else r for r in about["residuals"]),
            nfe=about["nfe"],
            seconds=about["seconds"],
            seed=about["seed"],
        )


@torch.no_grad()
def invert(
    model: FlowModel,
    image: str | Path | Image.Image,
    source_prompt: str | None = None,
    *,
    preset: str | Preset = "exact",
    **settings: Any,
) -> Inversion:
    """Find the noise from which the model would generate an image under a prompt.

    Args:
        model: from `rectiflow.load`.
        image: a file, or a picture of any size.
        source_prompt: what the image shows; the empty prompt when None.
        preset: a name of `PRESETS` or a `Preset`.
        **settings: fields of the preset to replace, such as ``num_inference_steps=15``.

    Returns:
        The whole path, with what it cost and how well it fits.

    Raises:
        InputError: the image cannot be read, or a setting is wrong.
        WorkError: the network returned something that is not a number.
    """
    chosen = get_preset(preset, **settings)
    started = time.perf_counter()
    pixels, restore = fit(load_image(image), model.size_policy)
    latents = model.encode_image(pixels)
    grid = grid_for(model, chosen, latents)
    prompt = source_prompt or ""
    velocity = GuidedVelocity(model, model.encode_prompt([prompt]))
    trajectory, residuals, evaluations = invert_latents(velocity, latents, grid, chosen)
    if not torch.isfinite(trajectory).all():
        raise WorkError(f"{model.name} returned numbers that are not finite in {model.dtype}")
    return Inversion(
        model=model,
        trajectory=trajectory,
        grid=grid,
        source_prompt=prompt,
        preset=chosen,
        restore=restore,
        residuals=tuple(residuals[:, 0].tolist()),
        nfe=int(evaluations.sum()),
        seconds=time.perf_counter() - started,
    )


def invert_latents(
    velocity: GuidedVelocity, latents: Tensor, grid: Tensor, preset: Preset
) -> tuple[Tensor, Tensor, Tensor]:
    """Invert a batch of latents ``[B, C, h, w]`` by a preset's scheme.

    Returns:
        Trajectory ``[N + 1, B, C, h, w]``, residuals and evaluations ``[N, B]``.
    """
    if preset.scheme == "euler":
        result = euler_inversion(velocity, latents, grid, time=preset.time)
    else:
        result = fixed_point_inversion(
            RowwiseGuidedVelocity(velocity, len(latents)),
            latents,
            grid,
            iterations=preset.iterations,
            tolerance=preset.tolerance,
            average=preset.average,
            warm_start=preset.warm_start,
        )
    return result.trajectory, result.residuals, result.evaluations


@torch.no_grad()
def from_seed(
    model: FlowModel,
    source_prompt: str,
    seed: int,
    *,
    preset: str | Preset = "exact",
    height: int | None = None,
    width: int | None = None,
    **settings: Any,
) -> Inversion:
    """The path of a generated image: no inversion is needed, the flow itself came that way.

    Args:
        model: from `rectiflow.load`.
        source_prompt: what to generate.
        seed: of its noise.
        preset: a name of `PRESETS` or a `Preset`; its guidance generates the image.
        height: in pixels; the model's default when None.
        width: in pixels; the model's default when None.
        **settings: fields of the preset to replace.

    Raises:
        InputError: a setting is wrong, or the model does not take this size.
        WorkError: the network returned something that is not a number.
    """
    chosen = get_preset(preset, **settings)
    started = time.perf_counter()
    height, width = height or model.default_size, width or model.default_size
    noise = initial_noise(model, [seed], height, width)
    grid = grid_for(model, chosen, noise)
    solution = generate_latents(
        model,
        [source_prompt],
        noise,
        guidance_scale=chosen.guidance_scale,
        grid=grid,
        keep_trajectory=True,
    )
    assert solution.trajectory is not None
    size = (width, height)
    return Inversion(
        model=model,
        trajectory=solution.trajectory,
        grid=grid,
        source_prompt=source_prompt,
        preset=chosen,
        restore=Restore(size, size, (0, 0), size),
        residuals=(0.0,) * (len(grid) - 1),
        nfe=solution.nfe,
        seconds=time.perf_counter() - started,
        seed=seed,
    )


def grid_for(model: FlowModel, preset: Preset, latents: Tensor) -> Tensor:
    """The preset's time grid for this model and this size of latents, on the model's device."""
    tokens = latents.shape[-2] * latents.shape[-1] // model.patch**2
    points = make_grid(
        preset.grid, preset.num_inference_steps, shift=model.shift, num_tokens=tokens
    )
    return points.to(model.device)

"""An inversion: the whole path from an image to its noise, kept, saved, and run forward again."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rectiflow.arguments import checked
from rectiflow.errors import InputError
from rectiflow.flow.measure import NoiseStatistics, noise_statistics
from rectiflow.flow.solver import CountedVelocity
from rectiflow.guarded import Missing, Unreadable
from rectiflow.invert.presets import Preset
from rectiflow.invert.result import InversionResult
from rectiflow.invert.schemes import SCHEMES
from rectiflow.models.base import FlowModel
from rectiflow.models.guidance import GuidedVelocity
from rectiflow.models.identity import difference
from rectiflow.models.images import Restore
from rectiflow.models.prompts import Conditioning
from rectiflow.progress import steps
from rectiflow.sealed import load_sealed, save_sealed

FORMAT = 3


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
    path: InversionResult = field(repr=False)
    """What the scheme found, float32, of one image."""
    grid: Tensor = field(repr=False)
    """Rising times, float32 ``[N + 1]``, on the CPU."""
    source_prompt: str
    preset: Preset
    restore: Restore
    """Where the picture lies in the model's, and the way back to its own size."""
    nfe: int
    """Network samples it cost."""
    seconds: float
    seed: int | None = None
    """The seed of a generated source; None for a real image."""
    guidance_scale: float = 1.0
    """Under which a generated source was generated; inversion runs without guidance."""
    picture: Image.Image | None = field(default=None, repr=False)
    """The picture that was inverted, RGB and upright; None of a generated source."""

    @cached_property
    def conditioning(self) -> Conditioning:
        """The prompt under which the path was found, embedded: one row."""
        return self.model.encode_prompt([self.inverted_prompt])

    @property
    def trajectory(self) -> Tensor:
        """States at the grid's times, ``[N + 1, 1, C, h, w]``."""
        return self.path.trajectory

    @property
    def residuals(self) -> tuple[float, ...]:
        """How far each step is from its exact inverse, relative to the state; empty if unknown."""
        known = self.path.residuals[:, 0]
        return () if known.isnan().any() else tuple(known.tolist())

    @property
    def noise(self) -> Tensor:
        """The noise end of the path, ``[1, C, h, w]``."""
        return self.trajectory[0]

    @property
    def latents(self) -> Tensor:
        """The image end of the path, ``[1, C, h, w]``."""
        return self.trajectory[-1]

    @property
    def noise_statistics(self) -> NoiseStatistics | None:
        """How far the noise is from N(0, I); None where the path does not begin at noise that the
        model found.
        """
        if not self.inverted or self.preset.strength < 1:
            return None
        # A diffusion model's path may begin a little after 0; there it is its own state, of unit
        # variance, that is like noise.
        t = self.grid[0]
        return noise_statistics(self.noise / torch.hypot(t, 1 - t))

    @property
    def inverted(self) -> bool:
        """Whether the path is one along which the model itself moves, back or forth."""
        return SCHEMES[self.preset.scheme].inverts

    @property
    def residual(self) -> float | None:
        """The largest residual of any step; None if unknown."""
        return max(self.residuals, default=None)

    def images(self, latents: Tensor) -> list[Image.Image]:
        """Decode latents ``[B, C, h, w]`` at the source's size."""
        return self.restore(self.model.decode(latents))

    @property
    def inverted_prompt(self) -> str:
        """The prompt under which the path was found; a generated one is always the source's."""
        empty = self.preset.inversion_prompt == "empty" and self.seed is None
        return "" if empty else self.source_prompt

    @property
    def source_path(self) -> InversionResult:
        """The path as the source's row of an edit follows it, under `source_prompt`."""
        same = self.inverted_prompt == self.source_prompt
        return self.path if same else self.path.under_another_prompt()

    @torch.no_grad()
    def reconstruct(self, compensate: bool = True) -> Reconstruction:
        """Generate the image again from its noise under the prompt it was inverted under.

        Args:
            compensate: add to every velocity what returns the stored path (stage II of FTEdit,
                equation 9); exact up to rounding, however bad the inversion was. Without it the
                result shows how good the inversion is.
        """
        guidance = self.guidance_scale if self.inverted else 1.0
        velocity = GuidedVelocity(self.model, self.conditioning, None, guidance)
        counted = CountedVelocity(velocity)
        scheme = SCHEMES[self.path.scheme or self.preset.scheme]
        solver = scheme.solver(self.path, self.grid, torch.zeros(1).long())
        sizes, memory, x = [], None, self.noise
        with steps("reconstructing", len(self.grid) - 1) as velocity.on_step:
            for step, (t, t_next) in enumerate(pairwise(self.grid)):
                landed, memory = solver.step(counted, x, t, t_next, step, memory)
                correction = self.trajectory[step + 1] - landed
                sizes.append(correction.norm() / (landed - x).norm().clamp_min(1e-12))
                x = landed + correction if compensate else landed
        return Reconstruction(
            latents=x,
            image=self.images(x)[0],
            max_abs_latent=(x - self.latents).abs().max().item(),
            compensation=torch.stack(sizes).cpu(),
            nfe=counted.nfe,
        )

    @checked
    def save(self, path: str | Path) -> Path:
        """Write one safetensors file: trajectory, grid and picture, all else as one JSON key, and
        a checksum of all of it, which `load` compares.

        Recorded features are not saved; an edit from the file computes the source's row again.
        """
        path = Path(path)
        about = {
            "format": FORMAT,
            "model": self.model.name,
            "weight_hash": self.model.weight_hash,
            "identity": self.model.identity,
            "source_prompt": self.source_prompt,
            "preset": dataclasses.asdict(self.preset),
            "restore": dataclasses.asdict(self.restore),
            "nfe": self.nfe,
            "seconds": self.seconds,
            "seed": self.seed,
            "guidance_scale": self.guidance_scale,
            "scheme": self.path.scheme,
        }
        tensors = {"grid": self.grid, "trajectory": self.trajectory}
        tensors |= {"residuals": self.path.residuals, "evaluations": self.path.evaluations}
        if self.picture is not None:
            tensors["picture"] = torch.from_numpy(np.array(self.picture))
        tensors |= {
            name: found
            for name in ("velocities", "offsets", "times")
            if (found := getattr(self.path, name)) is not None
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        save_sealed(path, tensors, about)
        return path

    @classmethod
    @checked
    def load(cls, path: str | Path, model: FlowModel) -> Inversion:
        """Read what `save` wrote, for the model that made it.

        Raises:
            InputError: no such file, not an inversion, not what was written, or another model's.
        """
        try:
            tensors, about = load_sealed(Path(path))
            if about["format"] != FORMAT:
                raise InputError(
                    f"{path} has format {about['format']} and this version of rectiflow reads "
                    f"{FORMAT}: invert again"
                )
            grid, pixels = tensors.pop("grid"), tensors.pop("picture", None)
            states: dict[str, Any] = dict(tensors)
            path_of_states = InversionResult(**states, scheme=about["scheme"])
        except Missing:
            raise InputError(f"no inversion at {path}: make one with `rectiflow invert`") from None
        except Unreadable as error:
            raise InputError(
                f"{path} is not a saved inversion ({error.why}): invert again"
            ) from error
        except (KeyError, TypeError):
            raise InputError(f"{path} is not a saved inversion") from None
        if about["weight_hash"] != model.weight_hash:
            raise InputError(
                f"{path} was made with {about['model']} (weights {about['weight_hash'][:12]}) and "
                f"not with {model.name} (weights {model.weight_hash[:12]}): load that model in the "
                "same dtype, or invert again"
            )
        if words := difference(about.get("identity"), model.identity, str(path), model.name):
            raise InputError(
                f"{path} was made by the same weights as another field ({words}): put that back, "
                "or invert again"
            )
        try:
            preset = Preset(**about["preset"] | {"features": tuple(about["preset"]["features"])})
        except TypeError:
            raise InputError(f"{path} holds settings that this version does not know") from None
        restore = {name: tuple(value) for name, value in about["restore"].items()}
        return cls(
            model=model,
            path=path_of_states.to(model.device),
            grid=grid,
            source_prompt=about["source_prompt"],
            preset=preset,
            restore=Restore(**restore),
            nfe=about["nfe"],
            seconds=about["seconds"],
            seed=about["seed"],
            guidance_scale=about["guidance_scale"],
            picture=None if pixels is None else Image.fromarray(pixels.numpy()),
        )

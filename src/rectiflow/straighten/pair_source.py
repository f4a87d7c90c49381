"""Where pairs come from: a teacher that generates from noise, or real images run backwards."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from PIL import ImageOps
from torch import Tensor

from rectiflow.errors import InputError, WorkError
from rectiflow.flow.grid import make_grid
from rectiflow.flow.solver import integrate
from rectiflow.models.base import FlowModel
from rectiflow.models.generate import generate_latents, initial_noise
from rectiflow.models.guidance import GuidedVelocity
from rectiflow.models.images import RESAMPLE, to_tensor
from rectiflow.models.picture import load_image
from rectiflow.straighten.manifest import Manifest


class Source(Protocol):
    """What makes pairs; the same for the same batch of indices, always."""

    def pairs(self, indices: range) -> tuple[Tensor, Tensor]:
        """x_0 and x_1 of a batch, float32 [B, C, h, w] on the CPU."""
        ...

    def noise(self, indices: range) -> Tensor:
        """x_0 of pairs where a seed gives it, float32 [B, C, h, w] on the CPU."""
        ...

    def trial(self) -> None:
        """See that the settings work, at the cost of one row and one step.

        Raises:
            InputError: A setting is wrong.
        """
        ...


@dataclass(frozen=True, eq=False)
class Generated:
    """Noise of the pair's own seed, and what the teacher makes of it.

    Args:
        model: The teacher.
        manifest: The settings.
        prompts: As many as the manifest says.
    """

    model: FlowModel
    manifest: Manifest
    prompts: Sequence[str]

    def pairs(self, indices: range) -> tuple[Tensor, Tensor]:
        """x_0 and x_1 of a batch."""
        made = self.manifest
        x_0 = self._noise(indices)
        prompts = [self.prompts[made.prompt_index(i)] for i in indices]
        return x_0.cpu(), self._end(prompts, x_0, made.num_inference_steps)

    def noise(self, indices: range) -> Tensor:
        """x_0 of pairs."""
        return self._noise(indices).cpu()

    def trial(self) -> None:
        """One row, one step."""
        self._end(self.prompts[:1], self._noise(range(1)), 1)

    def _noise(self, indices: range) -> Tensor:
        made = self.manifest
        return initial_noise(self.model, [made.seed(i) for i in indices], made.height, made.width)

    def _end(self, prompts: Sequence[str], x_0: Tensor, steps: int) -> Tensor:
        solution = generate_latents(
            self.model,
            prompts,
            x_0,
            negative_prompt=self.manifest.negative_prompt,
            num_inference_steps=steps,
            guidance_scale=self.manifest.guidance_scale,
            solver=self.manifest.solver,
        )
        return solution.x.float().cpu()


@dataclass(frozen=True, eq=False)
class Inverted:
    """Real images, and the noise from which the teacher's flow leads to them.

    The flow is integrated from t = 1 back to where it begins, starting from x_1 as it is stored, in
    float16. Image i has caption i.

    Args:
        model: The teacher.
        manifest: The settings.
        prompts: The captions.
        images: The files.
    """

    model: FlowModel
    manifest: Manifest
    prompts: Sequence[str]
    images: Sequence[Path]

    def pairs(self, indices: range) -> tuple[Tensor, Tensor]:
        """x_0 and x_1 of a batch."""
        made = self.manifest
        x_1 = self._latents([self.images[i] for i in indices])
        return self._start([self.prompts[i] for i in indices], x_1, made.num_inference_steps)

    def noise(self, indices: range) -> Tensor:
        """There is no seed that gives it."""
        raise InputError("the noise of inverted pairs is in the store")

    def trial(self) -> None:
        """One image, one step."""
        self._start(self.prompts[:1], self._latents(self.images[:1]), 1)

    def _latents(self, files: Sequence[Path]) -> Tensor:
        size = self.manifest.width, self.manifest.height
        pictures = [ImageOps.fit(load_image(file), size, RESAMPLE) for file in files]
        batch = torch.cat([to_tensor(picture) for picture in pictures]).to(self.model.device)
        return self.model.encode_image(batch).half().float()

    def _start(self, prompts: Sequence[str], x_1: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        model, made = self.model, self.manifest
        negative = None
        if made.negative_prompt:
            negative = model.encode_prompt(made.negative_prompt)
        field = GuidedVelocity(model, model.encode_prompt(prompts), negative, made.guidance_scale)
        x = integrate(field, x_1, self._grid(steps).flip(0), made.solver).x
        # A diffusion network's flow begins from a multiple of the noise.
        x_0 = x / model.initial_state(torch.ones_like(x))
        if not torch.isfinite(x_0).all():
            raise WorkError(f"{model.name} returned numbers that are not finite in {model.dtype}")
        return x_0.float().cpu(), x_1.cpu()

    def _grid(self, steps: int) -> Tensor:
        """That of `generate_latents`, where none is given."""
        model = self.model
        if model.default_grid == "student":
            return model.student_grid(steps)
        _, height, width = self.manifest.latent_shape
        tokens = height * width // model.patch**2
        shift = model.shift_for(tokens)
        return make_grid(model.default_grid, steps, shift=shift, num_tokens=tokens)


def hash_files(files: Sequence[Path]) -> str:
    """SHA-256 over the bytes of files, one after the other.

    Raises:
        InputError: One of them cannot be read.
    """
    digest = hashlib.sha256()
    for file in files:
        try:
            with file.open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
        except OSError as error:
            raise InputError(f"cannot read {file}: {error.strerror}") from error
    return digest.hexdigest()

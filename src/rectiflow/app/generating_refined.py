"""``rectiflow generate --refine``: pictures of one model, refined by another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rectiflow.app import options, record
from rectiflow.app.outputs import Outputs
from rectiflow.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

    from rectiflow.models.base import FlowModel


@dataclass(frozen=True)
class Refinement:
    """How pictures are refined, as the options say."""

    model: str
    strength: float
    steps: int | None
    guidance: float | None

    @staticmethod
    def of(
        model: str | None, strength: float | None, steps: int | None, guidance: float | None
    ) -> Refinement | None:
        """What the options describe, or None without --refine.

        Raises:
            InputError: an option of the refinement is given without it.
        """
        if model is None:
            given = {
                "--strength": strength,
                "--refine-steps": steps,
                "--refine-guidance": guidance,
            }
            for option, value in given.items():
                if value is not None:
                    raise InputError(f"{option} is for --refine: give that too")
            return None
        return Refinement(model, 0.5 if strength is None else strength, steps, guidance)

    def check(self) -> None:
        """Refuse what no model could do.

        Raises:
            InputError: says what to give.
        """
        if not 0 < self.strength <= 1:
            raise InputError(f"--strength is {self.strength}: give above 0, and at most 1")
        if self.steps is not None and self.steps < 1:
            raise InputError(f"--refine-steps is {self.steps}: give 1 or more")
        options.check_finite("--refine-guidance", self.guidance)

    def record(self, refiner: FlowModel, seed: int | None = None) -> dict[str, Any]:
        """What a picture has to say of how it was refined.

        Args:
            refiner: the model that refines.
            seed: of the picture; None for what all have in common.
        """
        steps = refiner.default_num_inference_steps if self.steps is None else self.steps
        guidance = refiner.default_guidance_scale if self.guidance is None else self.guidance
        noise = {} if seed is None else {"seed": seed}
        return (
            record.of_model(refiner)
            | {
                "strength": self.strength,
                "num_inference_steps": steps,
                "guidance_scale": guidance,
                "grid": refiner.default_grid,
                "method": "euler",
            }
            | noise
        )

    def write_all(
        self,
        refiner: FlowModel,
        images: list[Image.Image],
        about: dict[str, Any],
        seeds: list[int],
        single: str | None,
        outputs: Outputs,
    ) -> tuple[list[dict[str, Any]], list[Image.Image]]:
        """Refine pictures one by one and write them beside the others.

        Args:
            refiner: the model that refines.
            images: to be refined.
            about: the record that all of them share.
            seeds: theirs.
            single: the name of the file of a single picture.
            outputs: where files go.

        Returns:
            An entry of the result for each, and the pictures.
        """
        from rectiflow.report import save_picture

        entries, refined = [], []
        for image, seed in zip(images, seeds, strict=True):
            made = about | {"seed": seed, "refinement": self.record(refiner, seed)}
            new, nfe = repaint(refiner, image, made)
            file = outputs.file(single or f"{seed}-refined.png")
            save_picture(new, file, made)
            entries.append(
                {
                    "image": file.name,
                    "prompt": about["prompt"],
                    "seed": seed,
                    "nfe": nfe,
                    "refined_from": None if single else file.name.replace("-refined", ""),
                }
            )
            refined.append(new)
        return entries, refined


def repaint(
    refiner: FlowModel, image: Image.Image, made: dict[str, Any]
) -> tuple[Image.Image, int]:
    """A picture refined as its record says, and the network samples that cost."""
    from rectiflow.models import fit, initial_noise
    from rectiflow.models.refine import refine_latents

    how = made["refinement"]
    pixels, restore = fit(image, refiner.size_policy)
    height, width = pixels.shape[-2:]
    solution = refine_latents(
        refiner,
        refiner.encode_image(pixels),
        made["prompt"],
        initial_noise(refiner, [how["seed"]], height, width),
        strength=how["strength"],
        negative_prompt=made["negative_prompt"],
        num_inference_steps=how["num_inference_steps"],
        guidance_scale=how["guidance_scale"],
        grid=how["grid"],
        solver=how["method"],
    )
    return restore(refiner.decode(solution.x))[0], solution.nfe

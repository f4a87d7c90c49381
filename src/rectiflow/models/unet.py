"""U-Nets of the Stable Diffusion family as velocity fields.

Conventions of the family: a U-Net trained as a diffusion model sees `x_t = √ᾱ x_1 + √(1 - ᾱ) x_0`
and a timestep from 999 (noise) down to 0, and predicts ε, the sample or diffusion-v, as the
scheduler's `prediction_type` says; its field is the exact conversion (`flow.diffusion`). A
rectified one (`"flow_prediction"`) sees the straight path's own state and the timestep 1000σ, with
σ = 1 - t, and predicts noise - data.
"""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from rectiflow.errors import InputError
from rectiflow.flow.device import precise, time_for
from rectiflow.flow.diffusion import StraightenedVelocity, VariancePreservingPath
from rectiflow.models import codec
from rectiflow.models.base import AttentionSite, FlowModel
from rectiflow.models.metadata import Metadata
from rectiflow.models.prompts import Conditioning

PREDICTIONS = {
    "epsilon": "epsilon",
    "v_prediction": "v_prediction",
    "sample": "sample",
    "flow_prediction": "velocity",
}
"""What schedulers say that a network predicts, and our names for it."""

SMALLEST_ALPHA = 2.0**-24
"""What diffusers' solvers have as ᾱ at the last timestep where the terminal SNR is zero."""

LARGEST_RATIO = 4
"""No U-Net has a table of positions to run out of. Far beyond what it was trained on there are no
good pictures, only long waits: 4 times the side."""


class UNetModel(FlowModel):
    """What `SDModel` and `SDXLModel` have in common: all but prompts and added conditions.

    Args:
        pipeline: A diffusers pipeline with a `unet`, its networks in evaluation mode.
        name: What the model is called in reports and saved files.
        metadata: What its folder says about its use.

    Raises:
        InputError: The network, scheduler or codec is of a kind that cannot be used.
    """

    text_first: ClassVar[bool] = False

    def __init__(
        self, pipeline: Any, *, name: str = "unnamed", metadata: Metadata | None = None
    ) -> None:
        super().__init__(pipeline, name=name, metadata=metadata)
        self._path: tuple[Any, VariancePreservingPath] | None = None
        config = self.network.config
        if config.in_channels != config.out_channels:
            raise InputError(
                f"{name} takes {config.in_channels} channels and gives {config.out_channels}, as "
                "networks for inpainting do: use a text-to-image model"
            )
        said = pipeline.scheduler.config.get("prediction_type", "epsilon")
        if said not in PREDICTIONS:
            raise InputError(
                f"{name}: the scheduler's prediction_type is {said!r}: one of "
                f"{', '.join(PREDICTIONS)} is understood"
            )
        if PREDICTIONS[said] != "velocity" and not hasattr(pipeline.scheduler, "alphas_cumprod"):
            raise InputError(
                f"{name}: a {type(pipeline.scheduler).__name__} has no table of alphas_cumprod: "
                "only variance-preserving schedules are understood"
            )
        if pipeline.vae.config.get("shift_factor"):
            raise InputError(
                f"{name}: its codec has a shift_factor, which pipelines of this family ignore: "
                "set it to null in vae/config.json if the network was trained without"
            )

    @property
    def network(self) -> Any:
        """The `UNet2DConditionModel`."""
        return self.pipeline.unet

    @property
    def factor(self) -> int:
        """Pixels per latent cell, along one side: 8 for Stability's codec."""
        return self.pipeline.vae_scale_factor

    @property
    def patch(self) -> int:
        """1: a U-Net begins with single cells."""
        return 1

    @property
    def largest(self) -> int:
        """The longest side we take, in pixels: 4 times what the network was made for."""
        return LARGEST_RATIO * self.default_size

    @property
    def channels(self) -> int:
        """Channels of a latent."""
        return self.network.config.in_channels

    @property
    def default_size(self) -> int:
        """Side of the square image the network was made for, in pixels."""
        side = self.network.config.sample_size
        return self.metadata.default_size or self.factor * (
            side if isinstance(side, int) else max(side)
        )

    @property
    def default_guidance_scale(self) -> float:
        """From the metadata, else diffusers' for this family; of a rectified flow 1.5, or 1 if it
        is made for few steps (InstaFlow, arXiv 2309.06380, section 4).
        """
        if self.metadata.default_guidance_scale is not None:
            return self.metadata.default_guidance_scale
        if self.prediction_type != "velocity":
            return self._usual_guidance
        return 1.0 if self.metadata.student_steps else 1.5

    _usual_guidance: ClassVar[float] = 7.5

    @property
    def default_num_inference_steps(self) -> int:
        """From the metadata, else the fewest that a student is made for, else 25."""
        steps = self.metadata.student_steps
        return self.metadata.default_num_inference_steps or (min(steps) if steps else 25)

    @property
    def shift(self) -> float:
        """Of a rectified network the scheduler's `flow_shift`; 1 for diffusion models."""
        if self.prediction_type != "velocity":
            return 1.0
        return float(self.pipeline.scheduler.config.get("flow_shift", 1.0))

    @property
    def default_solver(self) -> str:
        """DPM-Solver++ for a diffusion model, Euler for a rectified flow or a few-step student."""
        straight = self.prediction_type == "velocity" or self.metadata.student_steps
        return "euler" if straight else "dpmpp"

    @property
    def default_grid(self) -> str:
        """`student_grid`, which is as good for many steps."""
        return "student"

    # The field.

    @property
    def num_train_timesteps(self) -> int:
        """T: timesteps are 0 … T - 1."""
        return int(self.pipeline.scheduler.config.num_train_timesteps)

    @property
    def prediction_type(self) -> str:
        """`"epsilon"`, `"v_prediction"`, `"sample"`, or `"velocity"` of a rectified network."""
        return PREDICTIONS[self.pipeline.scheduler.config.get("prediction_type", "epsilon")]

    @property
    def diffusion_path(self) -> VariancePreservingPath | None:
        """The path by the scheduler's table of ᾱ; None of a rectified network.

        Where the terminal SNR is zero, the last ᾱ is 2⁻²⁴ in its place, as in diffusers' solvers.
        """
        if self.prediction_type == "velocity":
            return None
        scheduler = self.pipeline.scheduler
        if self._path is None or self._path[0] is not scheduler:
            table = scheduler.alphas_cumprod.detach().cpu().double().clone()
            if scheduler.config.get("rescale_betas_zero_snr") or table[-1] <= 0:
                table[-1] = SMALLEST_ALPHA
            self._path = (scheduler, VariancePreservingPath(table))
        return self._path[1]

    @property
    def t_min(self) -> float:
        """`s_min` of the path; 0 of a rectified network."""
        path = self.diffusion_path
        return 0.0 if path is None else path.s_min

    @property
    def t_max(self) -> float:
        """`s_max` of the path; 1 of a rectified network."""
        path = self.diffusion_path
        return 1.0 if path is None else path.s_max

    def initial_state(self, x_0: Tensor) -> Tensor:
        """`x_0 / (a + b)` at the last timestep, where diffusers takes the noise for `x_t`."""
        if self.diffusion_path is None:
            return x_0
        s = self.t_min
        return x_0 * (s**2 + (1 - s) ** 2) ** 0.5

    def student_grid(self, num_inference_steps: int) -> Tensor:
        """The grid of diffusers' own pipelines; float32 [N + 1] on the CPU.

        Of a diffusion model that of the timesteps T, T - T/N, … (`timestep_spacing="trailing"`),
        less 1 each, then t = 1: Euler on it is DDIM. Of a rectified network that of
        `UniPCMultistepScheduler(use_flow_sigmas=True)`.

        Raises:
            InputError: There are not so many timesteps, or none was asked for.
        """
        total, path = self.num_train_timesteps, self.diffusion_path
        if not 1 <= num_inference_steps <= total:
            raise InputError(f"num_inference_steps is {num_inference_steps}: give 1 to {total}")
        if path is None:
            return _unipc_grid(num_inference_steps, self.shift, total)
        # As diffusers computes it: a half is rounded to the side on which its last bits are.
        left = np.arange(total, 0, -total / num_inference_steps)[:num_inference_steps]
        return path.grid(torch.from_numpy(left.round() - 1)).float()

    def leading_grid(self, num_inference_steps: int) -> Tensor:
        """The grid of diffusers' `DDIMScheduler` and `DDIMInverseScheduler` as they are by default.

        The timesteps ``k (T // N) + steps_offset``, k = N - 1, …, 0, then t = 1: Euler on it is
        DDIM with ``set_alpha_to_one=True``. float32 [N + 1] on the CPU.

        Raises:
            InputError: It is no diffusion model, or there are not so many timesteps.
        """
        path = self.diffusion_path
        if path is None:
            return super().leading_grid(num_inference_steps)
        total, steps = self.num_train_timesteps, num_inference_steps
        offset = int(self.pipeline.scheduler.config.get("steps_offset") or 0)
        timesteps = torch.arange(steps - 1, -1, -1) * (total // max(1, steps)) + offset
        if not 1 <= steps <= total or timesteps[0] >= total:
            raise InputError(
                f"num_inference_steps is {steps} of {total} timesteps from {offset} on: give from "
                f"1 to {total - offset}"
            )
        return path.grid(timesteps).float()

    @property
    def image_time(self) -> float:
        """1, or `t_max` where the scheduler's ``set_alpha_to_one`` is false."""
        config = self.pipeline.scheduler.config
        return 1.0 if config.get("set_alpha_to_one", True) else self.t_max

    def differentiable_velocity(self, x: Tensor, t: Tensor | float, cond: Conditioning) -> Tensor:
        """`v(x, t | c)` from one call of the network, in float32, or in float64 if `x` is."""
        x = x if x.dtype == torch.float64 else x.float()
        # One time for all rows is on the CPU, and stays there.
        time = torch.as_tensor(t)
        time = time.to(precise(time.device))
        path, predict = self.diffusion_path, partial(self.predict, cond=cond)
        if path is None:
            timestep = _rounded_down(time, self.num_train_timesteps)
            return -predict(x, time_for(timestep, x, x.dtype))
        return StraightenedVelocity(predict, path, self.prediction_type)(x, time)

    def predict(self, x_t: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        """What the network itself predicts, with gradients.

        Args:
            x_t: States of the network's own path, [B, C, h, w], float32 or float64.
            timestep: In [0, T - 1], fractional or not: one for all rows, or [B].
            cond: B rows.

        Returns:
            In the dtype of `x_t`, [B, C, h, w].
        """
        dtype, more = self.dtype, self.added_conditions(x_t, cond)
        if self.guidance_embeds:
            scale = torch.ones(len(x_t)) if cond.guidance is None else cond.guidance.cpu()
            more["timestep_cond"] = self.pipeline.get_guidance_scale_embedding(
                scale - 1, embedding_dim=self.network.config.time_cond_proj_dim
            ).to(x_t.device, dtype)
        prediction = self.network(
            x_t.to(dtype),
            timestep.expand(len(x_t)),
            encoder_hidden_states=cond.embeds.to(dtype),
            return_dict=False,
            **more,
        )[0]
        return prediction.to(x_t.dtype)

    def added_conditions(self, x_t: Tensor, cond: Conditioning) -> dict[str, Any]:
        """More keywords for the network."""
        return {}

    @property
    def guidance_embeds(self) -> bool:
        """Whether the U-Net takes a guidance scale as an input (LCM's do, and students may)."""
        return self.network.config.get("time_cond_proj_dim") is not None

    # Images and hook points.

    def encode_image(self, images: Tensor) -> Tensor:
        """The latents [B, C, h, w] of images [B, 3, H, W] in [0, 1]: the posterior's mode."""
        self.latent_shape(*images.shape[-2:])
        return codec.encode(self.pipeline.vae, images, self.device)

    def decode(self, latents: Tensor) -> Tensor:
        """The images [B, 3, H, W] in [0, 1] of latents [B, C, h, w]."""
        return codec.decode(self.pipeline.vae, latents, self.device)

    def attention_sites(self) -> list[AttentionSite]:
        """None: a U-Net looks text up but has no stream of it, which controls would act on."""
        return []


def _unipc_grid(steps: int, shift: float, total: int) -> Tensor:
    """1 - σ of diffusers' `UniPCMultistepScheduler` with flow sigmas, and then 1.

    Its timesteps are T σ rounded down, and so are those of our times; where rounding to float32
    would cross an integer, the time is moved a few of its last bits to the right side.
    """
    sigmas = np.linspace(1, 1 / total, steps + 1)[:-1]
    sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
    sigmas[0] -= 1e-6  # at 1 the logarithm of its signal-to-noise ratio would be no number
    wanted = torch.from_numpy((sigmas * total).astype(np.int64))
    t = torch.from_numpy(1 - sigmas).float()
    while bool((off := _rounded_down(t.double(), total) - wanted).any()):
        t = torch.where(off == 0, t, torch.nextafter(t, t + off.float()))
    return torch.cat([t, t.new_ones(1)])


def _rounded_down(t: Tensor, total: int) -> Tensor:
    """The integer timesteps that a rectified network is told at times `t`, in float64."""
    return (total * (1 - t)).floor().clamp(0, total - 1)

"""`emoji-sd`: the embedded diffusion model, an ordinary `StableDiffusionPipeline`.

A small U-Net that predicts ε under Stable Diffusion's own variance-preserving schedule; the
teacher of the embedded world's reflow. Its targets are not the noise that was drawn but what the
embedded flow `emoji-sd3` expects it to be, `E[x_0 | x_t]`: the same minimum with a fraction of the
variance, so that a small machine gets there in hours.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor
from pydantic import Field
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from rectiflow.emoji.caption import caption
from rectiflow.emoji.clip import text_config, tokenize
from rectiflow.emoji.latents import cached_latents, latents_folder, permuted
from rectiflow.emoji.scene import sample
from rectiflow.emoji.tokenizer import KNOWS, build_tokenizer, words
from rectiflow.emoji.vae import HELD_OUT
from rectiflow.flow.diffusion import VariancePreservingPath, variance_preserving
from rectiflow.models.folder import load_in_float32
from rectiflow.models.load import WEIGHTS, load
from rectiflow.models.metadata import Metadata, write_metadata
from rectiflow.report.sheet import contact_sheet
from rectiflow.straighten.config import TrainConfig

TIMESTEPS = 1000
SAMPLES = 32
"""Pictures of a sheet."""
BLOCK = 64
"""Samples for which the teacher is asked together."""


class SdConfig(TrainConfig):
    """Recipe `emoji-sd`."""

    recipe: str = "emoji-sd"
    steps: int = Field(default=10_000, gt=0)
    batch_size: int = 64
    learning_rate: float = 1e-3
    muon_learning_rate: float | None = 1.5e-3
    decay_steps: int = 2500
    ema_decay: float = 0.999
    checkpoint_minutes: float = 3
    vae: Path = WEIGHTS / "emoji-vae"
    """Folder of the codec."""
    teacher: Path | None = WEIGHTS / "emoji-sd3"
    """Folder of the flow whose expected noise is the target, and whose first text encoder starts
    this one's; None trains on the drawn noise, from a random text encoder."""
    latents: Path = Path("runs/latents")
    """Where encoded scenes are kept."""
    scenes: int = Field(default=100_000, ge=1000, le=1_000_000, multiple_of=1000)
    """How many distinct scenes are trained on."""
    distinct: int = Field(default=150_000, gt=0)
    """How many distinct samples (scene, noise, time, expected noise) there are; those of later
    rounds are not asked of the teacher again, whose answers take 2 KB each of memory."""
    widths: tuple[int, int] = (64, 144)
    """Channels at 16 × 16 and, with attention, at 8 × 8."""
    head_width: int = 48
    layers_per_block: int = 1
    text_width: int = 128
    text_layers: int = 3
    empty_prompts: float = Field(default=0.1, ge=0, lt=1)
    """Share of samples whose prompt is empty, so that guidance has something to push against."""
    largest_weight: float = Field(default=25.0, gt=0)
    """Of a sample: an error of ε counts 1 / s² times, as the error of the velocity it implies at
    straight time s, but no more than this."""


def build_unet(config: SdConfig, latent_channels: int) -> UNet2DConditionModel:
    """The untrained U-Net of a configuration."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=latent_channels,
        out_channels=latent_channels,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=config.widths,
        layers_per_block=config.layers_per_block,
        cross_attention_dim=config.text_width,
        attention_head_dim=tuple(max(1, width // config.head_width) for width in config.widths),
        norm_num_groups=16,
    )


def build_text_encoder(config: SdConfig) -> CLIPTextModel:
    """The untrained text encoder of a configuration."""
    width = config.text_width
    return CLIPTextModel(CLIPTextConfig(**text_config(width, config.text_layers, width)))


def build_scheduler() -> DPMSolverMultistepScheduler:
    """DPM-Solver++ (2M) on Stable Diffusion's schedule."""
    return DPMSolverMultistepScheduler(
        num_train_timesteps=TIMESTEPS,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        steps_offset=1,
    )


class _Objective(nn.Module):
    """The error of ε, weighted as that of the velocity it implies."""

    def __init__(
        self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, largest_weight: float
    ) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder
        self.largest_weight = largest_weight

    def forward(
        self, x_t: Tensor, epsilon: Tensor, timestep: Tensor, s: Tensor, input_ids: Tensor
    ) -> Tensor:
        embeds = self.text_encoder(input_ids).last_hidden_state
        prediction = self.unet(x_t, timestep, embeds, return_dict=False)[0]
        weight = s.square().reciprocal().clamp(max=self.largest_weight)
        return weight * (prediction.float() - epsilon).square().mean((1, 2, 3))


class SdTask:
    """Denoising the latents of random scenes."""

    def __init__(self, config: SdConfig) -> None:
        self.config = config
        torch.manual_seed(config.seed)
        self.vae = AutoencoderKL.from_pretrained(config.vae, dtype=torch.float32)
        self.vae.requires_grad_(False)
        self.unet = build_unet(config, self.vae.config.latent_channels)
        self.text_encoder = build_text_encoder(config)
        self.teacher = None if config.teacher is None else load(config.teacher, dtype=torch.float32)
        if config.init_from is not None:
            start = StableDiffusionPipeline.from_pretrained(config.init_from, dtype=torch.float32)
            self.unet.load_state_dict(start.unet.state_dict())
            self.text_encoder.load_state_dict(start.text_encoder.state_dict())
        elif config.teacher is not None:
            tower = config.teacher / "text_encoder"
            self.text_encoder = CLIPTextModel.from_pretrained(tower, dtype=torch.float32).train()
        # The fused kernel's backward pass is slow on a CPU; plain products are not.
        self.unet.set_attn_processor(AttnProcessor())
        self.network: nn.Module = _Objective(self.unet, self.text_encoder, config.largest_weight)
        if self.teacher is not None and config.mixed_precision == "bf16":
            self.teacher.network.bfloat16()
        self.path = VariancePreservingPath(build_scheduler().alphas_cumprod)
        folder = latents_folder(config.vae, config.latents)
        self.latents = cached_latents(self.vae, folder, config.scenes)
        self.captions = [caption(sample(seed)) for seed in range(config.scenes)]
        self._known: set[int] = set()
        self._expected = torch.zeros(config.distinct, *self.latents.shape[1:], dtype=torch.float16)

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        indices = [index % self.config.distinct for index in indices]
        x_1, x_0, timestep, captions = self._draw(indices)
        s = self.path.straight_time(timestep)
        a, b = (c.float()[:, None, None, None] for c in variance_preserving(s))
        # The pipelines of Stable Diffusion know no shift of latents.
        x_1 = x_1 + self._shift
        return {
            "x_t": a * x_1 + b * x_0,
            "epsilon": x_0 if self.teacher is None else self._expected_noise(indices),
            "timestep": timestep.long(),
            "s": s.float(),
            "input_ids": tokenize(captions),
        }

    def _draw(self, indices: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, list[str]]:
        """Latents, noise, timesteps and captions of distinct samples."""
        seeds, noises, normals, captions = [], [], [], []
        for index in indices:
            epoch, place = divmod(index, self.config.scenes)
            seed = permuted(place, epoch, self.config.scenes)
            generator = torch.Generator().manual_seed(index)
            noises.append(torch.randn(self.latents.shape[1:], generator=generator))
            normals.append(torch.randn((), generator=generator, dtype=torch.float64))
            empty = torch.rand((), generator=generator).item() < self.config.empty_prompts
            captions.append("" if empty else self.captions[seed])
            seeds.append(seed)
        # Logit-normal straight times, moved to the nearest timestep there is.
        timestep = self.path.timestep(torch.stack(normals).sigmoid()).round()
        return self.latents[seeds].float(), torch.stack(noises), timestep, captions

    @property
    def _shift(self) -> float:
        return (self.vae.config.shift_factor or 0.0) * self.vae.config.scaling_factor

    def _expected_noise(self, indices: Sequence[int]) -> Tensor:
        """`E[x_0 | x]` of the teacher's flow; the shift of the latents leaves it as it is.

        The teacher is asked for blocks that do not depend on the batch, so that its answers do not
        either, to the last bit.
        """
        assert self.teacher is not None
        for block in sorted({index // BLOCK for index in indices} - self._known):
            rows = range(block * BLOCK, min((block + 1) * BLOCK, self.config.distinct))
            x_1, x_0, timestep, captions = self._draw(rows)
            s = self.path.straight_time(timestep).float()
            time = s[:, None, None, None]
            x = (1 - time) * x_0 + time * x_1
            place, cond = self.teacher.device, self.teacher.encode_prompt(captions)
            velocity = self.teacher.velocity(x.to(place), s.to(place), cond).cpu()
            self._expected[rows.start : rows.stop] = (x - time * velocity).half()
            self._known.add(block)
        return self._expected[list(indices)].float()

    def pipeline(self) -> StableDiffusionPipeline:
        """The model as diffusers' own pipeline, sharing its weights."""
        return _pipeline(self.unet, self.text_encoder, self._codec(torch.float32))

    @torch.no_grad()
    def draw_samples(self, path: Path) -> None:
        captions = [caption(sample(seed)) for seed in range(HELD_OUT, HELD_OUT + SAMPLES)]
        pipeline = self.pipeline().to(self.unet.device)
        pipeline.set_progress_bar_config(disable=True)
        images = pipeline(
            captions,
            num_inference_steps=25,
            guidance_scale=5.0,
            height=64,
            width=64,
            generator=[torch.Generator().manual_seed(i) for i in range(len(captions))],
            output_type="np",
        ).images
        contact_sheet(images, columns=8, scale=2, captions=captions).save(path)

    def export(self, folder: Path) -> None:
        """Write the pipeline in half precision, and beside it what diffusers cannot store."""
        unet = build_unet(self.config, self.vae.config.latent_channels)
        unet.load_state_dict(self.unet.state_dict())
        encoder = build_text_encoder(self.config)
        encoder.load_state_dict(self.text_encoder.state_dict())
        codec = self._codec(torch.float16)
        _pipeline(unet.half(), encoder.half(), codec).save_pretrained(folder)
        load_in_float32(folder)
        metadata = Metadata(
            family="sd",
            default_guidance_scale=5.0,
            default_num_inference_steps=25,
            default_size=64,
            knows=KNOWS,
            vocabulary=" ".join(words()),
            licence="Apache-2.0",
        )
        write_metadata(metadata, folder)

    def _codec(self, dtype: torch.dtype) -> AutoencoderKL:
        """The codec without the shift of its latents, of which these pipelines know nothing."""
        codec = AutoencoderKL.from_pretrained(self.config.vae, dtype=dtype)
        codec.register_to_config(shift_factor=None)
        return codec


def _pipeline(
    unet: UNet2DConditionModel, text_encoder: CLIPTextModel, codec: AutoencoderKL
) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=codec,
        text_encoder=text_encoder,
        tokenizer=build_tokenizer(),
        unet=unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )

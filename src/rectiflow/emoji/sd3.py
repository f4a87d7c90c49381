"""`emoji-sd3`: the embedded flow transformer, an ordinary `StableDiffusion3Pipeline`.

1-rectified flow on the codec's latents, conditioned on two CLIP text towers that are trained
along with the transformer. There is no T5 to speak of (see `silent_t5`); its positions are as few
as they can be.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from diffusers.models.attention_processor import Attention
from pydantic import Field
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from rectiflow.emoji.caption import caption
from rectiflow.emoji.clip import text_config, tokenize
from rectiflow.emoji.latents import cached_latents, latents_folder, permuted
from rectiflow.emoji.scene import sample
from rectiflow.emoji.silent_t5 import silent_encoder, silent_tokenizer
from rectiflow.emoji.tokenizer import KNOWS, build_tokenizer, words
from rectiflow.emoji.vae import HELD_OUT
from rectiflow.models.folder import load_in_float32
from rectiflow.models.load import WEIGHTS
from rectiflow.models.metadata import Metadata, write_metadata
from rectiflow.report.sheet import contact_sheet
from rectiflow.straighten.config import TrainConfig

SAMPLES = 32
"""Pictures of a sheet."""


class Sd3Config(TrainConfig):
    """Recipe `emoji-sd3`."""

    recipe: str = "emoji-sd3"
    steps: int = Field(default=10_000, gt=0)
    batch_size: int = 128
    learning_rate: float = 1e-3
    muon_learning_rate: float | None = 1.5e-3
    decay_steps: int = 2500
    ema_decay: float = 0.9995
    checkpoint_minutes: float = 3
    vae: Path = WEIGHTS / "emoji-vae"
    """Folder of the codec."""
    clip: Path | None = WEIGHTS / "emoji-clip"
    """Folder whose text tower starts the first text encoder; None starts it at random."""
    latents: Path = Path("runs/latents")
    """Where encoded scenes are kept."""
    scenes: int = Field(default=80_000, ge=1000, le=1_000_000, multiple_of=1000)
    """How many distinct scenes are trained on."""
    num_layers: int = 6
    heads: int = 3
    head_width: int = 64
    text_widths: tuple[int, int] = (128, 64)
    text_layers: tuple[int, int] = (3, 2)
    empty_prompts: float = Field(default=0.1, ge=0, lt=1)
    """Share of samples whose prompt is empty, so that guidance has something to push against."""
    max_sequence_length: int = Field(default=1, ge=1)
    """T5 positions; all zeros, since there is no T5."""
    position_table: int = 16
    """Side of the table of positions in tokens: twice the 8 of 64 px, for other shapes."""


class MatmulJointAttention:
    """SD3's joint attention written out, for training on a CPU.

    The fused kernel's backward pass takes a third of a training step there; plain matrix products
    take a tenth. The arithmetic is diffusers' `JointAttnProcessor2_0`'s.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: None = None,
    ) -> tuple[Tensor, Tensor]:
        image_length = hidden_states.shape[1]

        def split(image: Tensor, text: Tensor) -> Tensor:
            return torch.cat([image, text], 1).unflatten(2, (attn.heads, -1)).transpose(1, 2)

        query = split(attn.to_q(hidden_states), attn.add_q_proj(encoder_hidden_states))
        key = split(attn.to_k(hidden_states), attn.add_k_proj(encoder_hidden_states))
        value = split(attn.to_v(hidden_states), attn.add_v_proj(encoder_hidden_states))
        weights = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1)
        mixed = (weights.to(value.dtype) @ value).transpose(1, 2).flatten(2)
        image, text = mixed[:, :image_length], mixed[:, image_length:]
        image = attn.to_out[1](attn.to_out[0](image))
        return image, text if attn.context_pre_only else attn.to_add_out(text)


def build_transformer(config: Sd3Config, latent_channels: int) -> SD3Transformer2DModel:
    """The untrained transformer of a configuration."""
    width = config.heads * config.head_width
    return SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=latent_channels,
        out_channels=latent_channels,
        num_layers=config.num_layers,
        attention_head_dim=config.head_width,
        num_attention_heads=config.heads,
        joint_attention_dim=sum(config.text_widths),
        caption_projection_dim=width,
        pooled_projection_dim=sum(config.text_widths),
        pos_embed_max_size=config.position_table,
        qk_norm=None,
    )


def build_text_encoder(config: Sd3Config, which: int) -> CLIPTextModelWithProjection:
    """The first (0) or second (1) untrained text encoder of a configuration."""
    width, layers = config.text_widths[which], config.text_layers[which]
    return CLIPTextModelWithProjection(CLIPTextConfig(**text_config(width, layers, width)))


class _Objective(nn.Module):
    """Flow matching (InstaFlow eq. 1) in diffusers' sign: the network predicts noise − data."""

    def __init__(
        self,
        transformer: SD3Transformer2DModel,
        text_encoders: Sequence[CLIPTextModelWithProjection],
        zeros: int,
    ) -> None:
        super().__init__()
        self.transformer = transformer
        self.text_encoders = nn.ModuleList(text_encoders)
        self.zeros = zeros

    def forward(self, x_1: Tensor, x_0: Tensor, t: Tensor, input_ids: Tensor) -> Tensor:
        outputs = [encoder(input_ids, output_hidden_states=True) for encoder in self.text_encoders]
        # The layout of StableDiffusion3Pipeline: penultimate states, then the T5's positions.
        embeds = torch.cat([output.hidden_states[-2] for output in outputs], -1)
        embeds = nn.functional.pad(embeds, (0, 0, 0, self.zeros))
        pooled = torch.cat([output.text_embeds for output in outputs], -1)
        time = t[:, None, None, None]
        prediction = self.transformer(
            hidden_states=(1 - time) * x_0 + time * x_1,
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
            timestep=1000 * (1 - t),
            return_dict=False,
        )[0]
        return (prediction.float() - (x_0 - x_1)).square().mean((1, 2, 3))


class Sd3Task:
    """Flow matching from noise to the latents of random scenes."""

    def __init__(self, config: Sd3Config) -> None:
        self.config = config
        torch.manual_seed(config.seed)
        self.vae = AutoencoderKL.from_pretrained(config.vae, dtype=torch.float32)
        self.vae.requires_grad_(False)
        self.transformer = build_transformer(config, self.vae.config.latent_channels)
        self.text_encoders = [build_text_encoder(config, which) for which in (0, 1)]
        if config.init_from is not None:
            self._start_from(config.init_from)
        elif config.clip is not None:
            tower = CLIPTextModelWithProjection.from_pretrained(config.clip, dtype=torch.float32)
            self.text_encoders[0].load_state_dict(tower.state_dict())
        self.transformer.set_attn_processor(MatmulJointAttention())
        self.network: nn.Module = _Objective(
            self.transformer, self.text_encoders, config.max_sequence_length
        )
        folder = latents_folder(config.vae, config.latents)
        self.latents = cached_latents(self.vae, folder, config.scenes)
        self.captions = [caption(sample(seed)) for seed in range(config.scenes)]

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        seeds, noises, times, captions = [], [], [], []
        for index in indices:
            epoch, place = divmod(index, self.config.scenes)
            seed = permuted(place, epoch, self.config.scenes)
            generator = torch.Generator().manual_seed(index)
            noises.append(torch.randn(self.latents.shape[1:], generator=generator))
            # Logit-normal times (SD3, arXiv 2403.03206, section 3.1).
            times.append(torch.sigmoid(torch.randn((), generator=generator)))
            empty = torch.rand((), generator=generator).item() < self.config.empty_prompts
            captions.append("" if empty else self.captions[seed])
            seeds.append(seed)
        return {
            "x_1": self.latents[seeds].float(),
            "x_0": torch.stack(noises),
            "t": torch.stack(times),
            "input_ids": tokenize(captions),
        }

    def pipeline(self) -> StableDiffusion3Pipeline:
        """The model as diffusers' own pipeline, sharing its weights."""
        return StableDiffusion3Pipeline(
            transformer=self.transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
            vae=self.vae,
            text_encoder=self.text_encoders[0],
            tokenizer=build_tokenizer(),
            text_encoder_2=self.text_encoders[1],
            tokenizer_2=build_tokenizer(),
            text_encoder_3=None,
            tokenizer_3=None,
        )

    @torch.no_grad()
    def draw_samples(self, path: Path) -> None:
        captions = [caption(sample(seed)) for seed in range(HELD_OUT, HELD_OUT + SAMPLES)]
        pipeline = self.pipeline().to(self.transformer.device)
        pipeline.set_progress_bar_config(disable=True)
        images = pipeline(
            captions,
            num_inference_steps=20,
            guidance_scale=3.0,
            height=64,
            width=64,
            max_sequence_length=self.config.max_sequence_length,
            generator=[torch.Generator().manual_seed(i) for i in range(len(captions))],
            output_type="np",
        ).images
        contact_sheet(images, columns=8, scale=2, captions=captions).save(path)

    def export(self, folder: Path) -> None:
        """Write the pipeline in half precision, and beside it what diffusers cannot store."""
        transformer = build_transformer(self.config, self.vae.config.latent_channels)
        transformer.load_state_dict(self.transformer.state_dict())
        encoders = [build_text_encoder(self.config, which) for which in (0, 1)]
        for copy, trained in zip(encoders, self.text_encoders, strict=True):
            copy.load_state_dict(trained.state_dict())
        pipeline = self.pipeline()
        components = dict(pipeline.components) | {
            "transformer": transformer.half(),
            "text_encoder": encoders[0].half(),
            "text_encoder_2": encoders[1].half(),
            "vae": AutoencoderKL.from_pretrained(self.config.vae, dtype=torch.float16),
            "text_encoder_3": silent_encoder(sum(self.config.text_widths)).half(),
            "tokenizer_3": silent_tokenizer(self.config.max_sequence_length),
        }
        StableDiffusion3Pipeline(**components).save_pretrained(folder)
        load_in_float32(folder)
        metadata = Metadata(
            family="sd3",
            max_sequence_length=self.config.max_sequence_length,
            default_guidance_scale=3.0,
            default_num_inference_steps=30,
            default_size=64,
            knows=KNOWS,
            vocabulary=" ".join(words()),
            licence="Apache-2.0",
        )
        write_metadata(metadata, folder)

    def _start_from(self, folder: Path) -> None:
        start = StableDiffusion3Pipeline.from_pretrained(folder, dtype=torch.float32)
        self.transformer.load_state_dict(start.transformer.state_dict())
        self.text_encoders[0].load_state_dict(start.text_encoder.state_dict())
        self.text_encoders[1].load_state_dict(start.text_encoder_2.state_dict())

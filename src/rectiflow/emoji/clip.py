"""`emoji-clip`: a small CLIP of the embedded world, trained contrastively on scenes.

Its text tower starts the text encoder of `emoji-sd3`; both towers give this world its CLIP score
and its Fréchet features.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from rectiflow.emoji.caption import caption
from rectiflow.emoji.scene import sample
from rectiflow.emoji.tokenizer import MAX_LENGTH, build_tokenizer
from rectiflow.emoji.vae import HELD_OUT, SIZE, scenes
from rectiflow.models.folder import load_in_float32
from rectiflow.report.sheet import contact_sheet
from rectiflow.straighten.config import TrainConfig


class ClipConfig(TrainConfig):
    """Recipe `emoji-clip`."""

    recipe: str = "emoji-clip"
    steps: int = Field(default=3000, gt=0)
    batch_size: int = 256
    learning_rate: float = 1e-3
    muon_learning_rate: float | None = 1e-3
    decay_steps: int = 800
    text_width: int = 128
    text_layers: int = 3
    vision_width: int = 128
    vision_layers: int = 4
    patch_size: int = 8
    projection: int = 128


def text_config(width: int, layers: int, projection: int) -> dict[str, object]:
    """A text tower over the world's tokenizer, as keyword arguments of `CLIPTextConfig`."""
    tokenizer = build_tokenizer()
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, width // 64),
        "max_position_embeddings": MAX_LENGTH,
        "projection_dim": projection,
        "hidden_act": "gelu",
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def build_clip(config: ClipConfig) -> CLIPModel:
    """The untrained model of a configuration."""
    vision = {
        "hidden_size": config.vision_width,
        "intermediate_size": 4 * config.vision_width,
        "num_hidden_layers": config.vision_layers,
        "num_attention_heads": config.vision_width // 64,
        "image_size": SIZE,
        "patch_size": config.patch_size,
        "projection_dim": config.projection,
        "hidden_act": "gelu",
    }
    return CLIPModel(
        CLIPConfig(
            text_config=text_config(config.text_width, config.text_layers, config.projection),
            vision_config=vision,
            projection_dim=config.projection,
        )
    )


def tokenize(captions: Sequence[str]) -> Tensor:
    """Token ids of captions, padded: int64 ``[B, MAX_LENGTH]``."""
    tokens = build_tokenizer()(
        list(captions), padding="max_length", truncation=True, return_tensors="pt"
    )
    ids: Tensor = tokens["input_ids"]
    return ids


class _Objective(nn.Module):
    def __init__(self, clip: CLIPModel) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, images: Tensor, input_ids: Tensor) -> Tensor:
        output = self.clip(pixel_values=2 * images - 1, input_ids=input_ids)
        logits = output.logits_per_image.float()
        # Two scenes of one caption are not each other's negatives.
        same = (input_ids[:, None] == input_ids[None]).all(-1)
        off_diagonal = same & ~torch.eye(len(same), dtype=torch.bool, device=same.device)
        logits = logits.masked_fill(off_diagonal, -1e4)
        labels = torch.arange(len(logits), device=logits.device)
        cross_entropy = nn.functional.cross_entropy
        return (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2


class ClipTask:
    """Contrastive learning on random scenes and their captions."""

    def __init__(self, config: ClipConfig) -> None:
        self.config = config
        torch.manual_seed(config.seed)
        self.clip = build_clip(config)
        if config.init_from is not None:
            start = CLIPModel.from_pretrained(config.init_from, dtype=torch.float32)
            self.clip.load_state_dict(start.state_dict())
        self.network: nn.Module = _Objective(self.clip)

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        seeds = [index % 1_000_000 for index in indices]
        captions = [caption(sample(seed)) for seed in seeds]
        return {"images": scenes(seeds), "input_ids": tokenize(captions)}

    @torch.no_grad()
    def draw_samples(self, path: Path) -> None:
        seeds = range(HELD_OUT, HELD_OUT + 64)
        captions = [caption(sample(seed)) for seed in seeds]
        images = scenes(seeds)
        place = self.clip.device
        output = self.clip(
            pixel_values=(2 * images - 1).to(place), input_ids=tokenize(captions).to(place)
        )
        chosen = output.logits_per_image.argmax(1)
        marks = [
            ("= " if captions[c] == captions[i] else "x ") + captions[c]
            for i, c in enumerate(chosen.tolist())
        ]
        pixels = images.permute(0, 2, 3, 1).numpy()
        contact_sheet(pixels, columns=8, scale=2, captions=marks).save(path)

    def export(self, folder: Path) -> None:
        """Write the model in half precision, its tokenizer and its image processor."""
        copy = build_clip(self.config)
        copy.load_state_dict(self.clip.state_dict())
        copy.half().save_pretrained(folder)
        load_in_float32(folder)
        build_tokenizer().save_pretrained(folder)
        CLIPImageProcessorPil(
            size={"shortest_edge": SIZE},
            crop_size={"height": SIZE, "width": SIZE},
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
        ).save_pretrained(folder)

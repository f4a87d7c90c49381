"""The world's training recipes by name: `rectiflow train emoji-vae` and its siblings."""

from __future__ import annotations

from typing import Any

from rectiflow.emoji.clip import ClipConfig, ClipTask
from rectiflow.emoji.sd import SdConfig, SdTask
from rectiflow.emoji.sd3 import Sd3Config, Sd3Task
from rectiflow.emoji.vae import VaeConfig, VaeTask
from rectiflow.straighten.config import TrainConfig
from rectiflow.straighten.trainer import Task

RECIPES: dict[str, tuple[type[TrainConfig], Any]] = {
    "emoji-vae": (VaeConfig, VaeTask),
    "emoji-clip": (ClipConfig, ClipTask),
    "emoji-sd3": (Sd3Config, Sd3Task),
    "emoji-sd": (SdConfig, SdTask),
}


def build_task(config: TrainConfig) -> Task:
    """The task of a recipe's configuration."""
    task: Task = RECIPES[config.recipe][1](config)
    return task

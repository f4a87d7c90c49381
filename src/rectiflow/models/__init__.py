"""Pretrained networks as velocity fields, and pictures in and out of them.

One file per family; diffusers' σ and sign stay in here. Neither this room nor its files import
diffusers before a model is loaded.
"""

from __future__ import annotations

from rectiflow.models.base import AttentionSite, FlowModel
from rectiflow.models.flux import FluxModel
from rectiflow.models.generate import generate, generate_latents, initial_noise
from rectiflow.models.guidance import GuidedVelocity, guided
from rectiflow.models.images import Restore, SizePolicy, fit, to_pil, to_tensor
from rectiflow.models.latent_walk import interpolate, slerp
from rectiflow.models.load import FAMILIES, embedded_models, load
from rectiflow.models.metadata import Metadata, read_metadata, write_metadata
from rectiflow.models.picture import load_image
from rectiflow.models.prompts import Conditioning, TokenSegment
from rectiflow.models.qwen_image import QwenImageModel
from rectiflow.models.refine import refine, refine_latents
from rectiflow.models.sd import SDModel
from rectiflow.models.sd3 import SD3Model
from rectiflow.models.sdxl import SDXLModel

__all__ = [
    "FAMILIES",
    "AttentionSite",
    "Conditioning",
    "FlowModel",
    "FluxModel",
    "GuidedVelocity",
    "Metadata",
    "QwenImageModel",
    "Restore",
    "SD3Model",
    "SDModel",
    "SDXLModel",
    "SizePolicy",
    "TokenSegment",
    "embedded_models",
    "fit",
    "generate",
    "generate_latents",
    "guided",
    "initial_noise",
    "interpolate",
    "load",
    "load_image",
    "read_metadata",
    "refine",
    "refine_latents",
    "slerp",
    "to_pil",
    "to_tensor",
    "write_metadata",
]

"""Steering: edit an image by changing its prompt, keeping what the prompt did not change."""

from __future__ import annotations

from rectiflow.invert.presets import PRESETS, Preset
from rectiflow.steer.alignment import Alignment, align, needleman_wunsch
from rectiflow.steer.chain import ChainResult, Turn, edit_chain
from rectiflow.steer.controls import AdaLNReplacement, AttentionInjection, controlled
from rectiflow.steer.edit import edit
from rectiflow.steer.edit_result import EditResult
from rectiflow.steer.editing import METHODS, edit_latents
from rectiflow.steer.subject import ConsistentResult, consistent
from rectiflow.steer.task import Edited, EditTask

__all__ = [
    "METHODS",
    "PRESETS",
    "AdaLNReplacement",
    "Alignment",
    "AttentionInjection",
    "ChainResult",
    "ConsistentResult",
    "EditResult",
    "EditTask",
    "Edited",
    "Preset",
    "Turn",
    "align",
    "consistent",
    "controlled",
    "edit",
    "edit_chain",
    "edit_latents",
    "needleman_wunsch",
]

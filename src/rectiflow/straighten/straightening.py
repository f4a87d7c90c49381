"""The task of straightening: batches from a coupling, the loss of a student, its measures, export.

What distinguishes reflow, distillation and flow matching is which points of which lines the
student sees and what is asked of it there; the loop is the one of all training here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from rectiflow.models.base import FlowModel
from rectiflow.models.prompts import Conditioning
from rectiflow.straighten import monitor, times
from rectiflow.straighten.attention import use_plain_attention
from rectiflow.straighten.coupling import Coupling, Piece
from rectiflow.straighten.losses import PERCEPTUAL, Perceptual, picture_distance
from rectiflow.straighten.objective import (
    EndObjective,
    Objective,
    VelocityObjective,
    pack,
    rows_by_step,
)
from rectiflow.straighten.settings import StraightenConfig
from rectiflow.straighten.student import rebuilt
from rectiflow.straighten.text_cache import TextCache

CACHE_BYTES = 256 * 2**20
"""Of embedded prompts."""


class StraightenTask:
    """A student and what it learns from, for `Trainer`.

    Args:
        config: All settings.
        student: From `student.begin`; its network is trained.
        coupling: Where samples come from.
        held_out: Samples to measure it on; None for no measures and sheets.
        record: What an export says of its origin, beside the configuration.
    """

    def __init__(
        self,
        config: StraightenConfig,
        student: FlowModel,
        coupling: Coupling,
        held_out: Piece | None = None,
        record: dict[str, Any] | None = None,
    ) -> None:
        self.config, self.student, self.coupling = config, student, coupling
        self.record = record or {}
        use_plain_attention(student.network)
        # Batches are made on the CPU, and moved by the loop without waiting for the device.
        self._texts = TextCache(student, CACHE_BYTES, torch.device("cpu"))
        self._lock = Lock()
        self.grids = {k: student.student_grid(k) for k in sorted(set(config.student_steps))}
        self.network: nn.Module = self._objective()
        self.probe = None if held_out is None else self._probe(held_out)
        self.latest: dict[str, float] = {}
        # A teacher shares the device with the student, and gains nothing by a thread of its own.
        self.thread_safe = config.coupling != "online" and not config.windows

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The samples of these numbers, as `network` takes them."""
        piece = self.coupling(indices)
        cond = monitor.told(self.student, self.embedded(piece.prompts), piece.guidance)
        rows = self._end(piece, indices) if self._distils else self._velocity(piece, indices)
        return rows | pack(cond)

    def embedded(self, prompts: Sequence[str]) -> Conditioning:
        """The prompts as the network sees them; embedded once, and from any thread."""
        with self._lock:
            return self._texts.encode_prompt(prompts)

    def measure(self) -> dict[str, float]:
        """Straightness, transport cost and the errors of few steps, on what is held out."""
        if self.probe is not None:
            with self._evaluating():
                self.latest = monitor.measure(self.student, self.probe)
        return self.latest

    def draw_samples(self, path: Path) -> None:
        """Write a sheet of what is held out: few steps, many steps, the pairs' own pictures."""
        if self.probe is not None:
            with self._evaluating():
                monitor.draw_sheet(self.student, self.probe, path)

    def export(self, folder: Path, dtype: torch.dtype = torch.float16) -> None:
        """Write a diffusers folder, a LoRA merged into the weights, with record and card."""
        from rectiflow.straighten.card import made_for_few_steps
        from rectiflow.straighten.export import save_pipeline

        config = self.config.model_dump(mode="json")
        record = self.record | {"config": config}
        if self.latest:
            record["measures"] = self.latest
        few = (self.config.windows,) if self.config.windows else self.config.student_steps
        # A model of its own: what it says of its weights is said of them as they are now.
        model = rebuilt(self.student, self.student.network)
        steps = few if made_for_few_steps(config) else ()
        save_pipeline(model, folder, dtype=dtype, record=record, student_steps=steps)

    def enable_gradient_checkpointing(self) -> None:
        """Let the network compute its activations twice rather than keep them."""
        self.student.network.enable_gradient_checkpointing()

    @property
    def _distils(self) -> bool:
        return self.config.kind == "distill"

    def _objective(self) -> Objective:
        config, student = self.config, self.student
        perceptual = None
        if config.loss in PERCEPTUAL:
            distance = picture_distance(config.lpips_weights, student.device)
            perceptual = Perceptual(student, distance, config.decode_chunk)
        if self._distils:
            return EndObjective(
                student, self.grids, config.loss, huber=config.huber, perceptual=perceptual
            )
        return VelocityObjective(
            student,
            config.loss,
            own_prediction=config.loss_space == "prediction",
            huber=config.huber,
            perceptual=perceptual,
        )

    def _end(self, piece: Piece, numbers: Sequence[int]) -> dict[str, Tensor]:
        """What distillation asks: from the noise to the pair's latents, in k steps."""
        steps = times.draw_steps(self.config.student_steps, self.config.seed, numbers)
        x = piece.started_from(self.student).x_0
        return {"x": x, "target": piece.x_1, "steps": steps, **rows_by_step(steps)}

    def _velocity(self, piece: Piece, numbers: Sequence[int]) -> dict[str, Tensor]:
        """What reflow and flow matching ask: the velocity at a point of the piece."""
        config, student = self.config, self.student
        if config.kind == "reflow" and not config.windows:
            piece = piece.started_from(student)
        low, high = piece.t_0.clamp(min=student.t_min), piece.t_1.clamp(max=student.t_max)
        if config.time_law != "grid":
            law = times.law(config.time_law, mean=config.time_mean, std=config.time_std)
            t = times.draw_times(law, config.seed, numbers, low, torch.maximum(low, high))
        elif config.windows:
            t = low
        else:
            steps = times.draw_steps(config.student_steps, config.seed, numbers)
            u = times.uniforms(config.seed, "time", numbers)[:, 0]
            t = times.draw_points(self.grids, steps, u)
        return {"x": piece.at(t), "t": t.float(), "target": piece.velocity}

    def _probe(self, held_out: Piece) -> monitor.Probe:
        config = self.config
        steps = (config.windows,) if config.windows else config.student_steps
        return monitor.Probe(
            held_out,
            monitor.told(self.student, self.embedded(held_out.prompts), held_out.guidance),
            num_inference_steps=config.held_out_steps,
            student_steps=tuple(sorted(set(steps))),
            paired=config.kind != "flow_matching",
            batch_size=config.held_out_batch,
        )

    def _evaluating(self) -> Any:
        return monitor.evaluating(self.student.network)

"""Every hyper-parameter of straightening a flow, validated together."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from rectiflow.straighten.config import TrainConfig
from rectiflow.straighten.coupling import Schedule
from rectiflow.straighten.losses import HUBER, MISSING_WEIGHTS, PERCEPTUAL, LossName
from rectiflow.straighten.student import LoraPlan, Stacking, Start

Kind = Literal["reflow", "distill", "flow_matching"]
Guidance = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class StraightenConfig(TrainConfig):
    """Reflow, distillation and flow matching: what is trained, on which pairs, by which loss.

    The defaults of the optimiser are the paper's (InstaFlow, arXiv 2309.06380).
    """

    CHANGEABLE: ClassVar[frozenset[str]] = TrainConfig.CHANGEABLE | {
        "decode_chunk",
        "held_out_batch",
    }

    recipe: str = "straighten"
    """What the run is called: a named configuration and its phase, where it is one."""
    kind: Kind = "reflow"
    steps: int = Field(default=50_000, gt=0)
    batch_size: int = Field(default=32, gt=0)
    learning_rate: float = Field(default=1e-6, gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    warmup_steps: int = Field(default=1000, ge=0)
    ema_decay: float = Field(default=0.9999, ge=0, lt=1)
    measure_every: int = Field(default=1000, ge=0)

    # The student.
    model: str
    """What the student begins as: the teacher, or an earlier student."""
    base: str | None = None
    """What gives the parts that a model in one file does not have."""
    loras: tuple[str, ...] = ()
    """LoRAs that the model has, as `FILE_OR_ID[@SCALE]`; the student begins with them merged."""
    variant: str | None = None
    """Of the model's weight files, as diffusers means it."""
    revision: str | None = None
    """Of a model on the hub."""
    start: Start = "exact"
    """Keep a diffusion network's own prediction, or read its weights as a velocity's."""
    loss_space: Literal["velocity", "prediction"] = "velocity"
    """Whose error counts: the velocity's, or that of what the network itself predicts."""
    stacked: Stacking | None = None
    """Two U-Nets in series, that share their weights or have weights of their own."""
    keep_middle: bool = False
    """Of two in series, keep the tail of the first and the head of the second."""
    guidance_embedded: bool = False
    """Tell the network the guidance scale of its pairs."""
    lora_rank: PositiveInt | None = None
    """Train a LoRA of this rank only."""
    lora_alpha: float | None = Field(default=None, gt=0)
    """The LoRA's strength times its rank; its rank if None."""
    lora_targets: tuple[str, ...] = LoraPlan.targets
    """Endings of the names of layers that get a LoRA."""

    # What it is trained on.
    coupling: Literal["stored", "online", "independent"] | None = None
    """Pairs of the store, pairs that the teacher makes on the fly, or the store's latents with
    noise of their own. None: independent for flow matching, else stored, or online if no store is
    named."""
    pairs: str | None = None
    """Address of the store."""
    any_teacher: bool = False
    """Accept pairs of a teacher that the model does not descend from."""
    anneal_steps: int = Field(default=0, ge=0)
    """Go from independent noise to the pairs' own over so many steps (SlimFlow)."""
    anneal_schedule: Schedule = "linear"
    drop_longest: float = Field(default=0.0, ge=0, lt=1)
    """Share of the pairs left out, those with the largest ‖x_1 − x_0‖."""
    flip: float = Field(default=0.0, ge=0, le=1)
    """With this probability a pair is mirrored, noise and latents together, unless its prompt
    speaks of left or right."""
    real: str | None = None
    """Address of a store of real images with their inversions, to be mixed in."""
    real_share: float = Field(default=0.0, ge=0, lt=1)
    """Share of the samples that come from there."""
    buffer_shards: PositiveInt = 8
    """Shards among which samples are shuffled."""

    # At which times.
    time_law: Literal["uniform", "logit_normal", "u_shaped", "grid"] = "uniform"
    """`grid`: only the times at which the student of `student_steps` will be asked."""
    time_mean: float = 0.0
    time_std: float = Field(default=1.0, gt=0)
    student_steps: tuple[PositiveInt, ...] = Field(default=(1,), min_length=1)
    """For how many Euler steps the student is made; each sample draws one of them."""
    windows: int = Field(default=0, ge=0)
    """Straighten within so many windows of time, each by itself (PeRFlow); 0 for the whole way."""
    windows_from: Literal["teacher", "noised"] = "teacher"
    """Enter a window on the teacher's trajectory, or at noised latents of the store."""

    # By which loss.
    loss: LossName = "l2"
    huber: float = Field(default=HUBER, gt=0)
    """c of the pseudo-Huber loss, per dimension."""
    lpips_weights: Path | None = None
    """LPIPS in a safetensors file, the folder of a CLIPModel, or `emoji-clip`."""
    decode_chunk: PositiveInt = 4
    """Latents decoded at a time, for losses of pictures."""

    # The online teacher.
    teacher: str | None = None
    """Who makes pairs or windows on the fly; the model itself if None."""
    prompts: Path | None = None
    """A file with a prompt a line, for pairs made on the fly."""
    solver: str | None = None
    """By which the teacher is solved; None: dpmpp for pairs of a diffusion model, else euler."""
    num_inference_steps: PositiveInt = 25
    guidance_scales: tuple[Guidance, ...] = Field(default=(5.0,), min_length=1)
    """Each sample draws one; up to 1 is no guidance."""
    negative_prompt: str | None = None
    height: PositiveInt | None = None
    width: PositiveInt | None = None

    # How it is looked at.
    held_out: int = Field(default=16, ge=0)
    """Pairs that are never trained on: those of the end of the store."""
    held_out_steps: PositiveInt = 20
    """Of the midpoint rule, for what counts as the student's accurate solution."""
    held_out_batch: PositiveInt = 16

    @model_validator(mode="before")
    @classmethod
    def _choose_coupling(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("coupling") is None:
            kind, pairs = given.get("kind", "reflow"), given.get("pairs")
            chosen = "stored" if pairs is not None else "online"
            given = given | {"coupling": "independent" if kind == "flow_matching" else chosen}
        return given

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        for complaint in self._complaints():
            raise ValueError(complaint)
        return self

    def _complaints(self) -> list[str]:
        found = []
        if (self.kind == "flow_matching") != (self.coupling == "independent"):
            found.append(
                f"kind {self.kind} with coupling {self.coupling}: independent noise is flow "
                "matching, and nothing else is"
            )
        if self.coupling == "online":
            if self.prompts is None:
                found.append(
                    "no pairs: name a store with --pairs, or with --set prompts=FILE the prompts "
                    "of pairs that the teacher makes on the fly"
                )
            if self.pairs is not None:
                found.append("coupling online makes its own pairs: leave pairs out")
        elif self.pairs is None:
            found.append(f"coupling {self.coupling} needs pairs, the address of a store")
        if self.windows:
            if self.kind != "reflow" or self.anneal_steps or self.loss in PERCEPTUAL:
                found.append("windows are for kind reflow, loss l2 or pseudo_huber, no annealing")
            elif (self.coupling == "online") != (self.windows_from == "teacher"):
                found.append(
                    "windows_from teacher needs prompts and no store; windows_from noised needs a "
                    "store"
                )
        if self.loss in PERCEPTUAL and self.lpips_weights is None:
            found.append(MISSING_WEIGHTS)
        if self.kind == "distill" and self.anneal_steps:
            found.append("anneal_steps is for reflow: distillation needs the pairs as they are")
        if self.loss_space == "prediction" and (self.kind == "distill" or self.loss in PERCEPTUAL):
            found.append("loss_space prediction is for reflow and flow matching in latents")
        if (self.real is None) != (self.real_share == 0):
            found.append("real and real_share go together")
        if self.anneal_steps > self.steps:
            found.append("anneal_steps is more than steps: the coupling would never be the pairs'")
        return found

    @property
    def loaded_with(self) -> dict[str, Any]:
        """What `load` is told beside the model's name."""
        told = {"base": self.base, "lora": self.loras, "variant": self.variant}
        return {key: value for key, value in (told | {"revision": self.revision}).items() if value}

    @property
    def lora(self) -> LoraPlan | None:
        """The LoRA to be trained, if it is one."""
        if self.lora_rank is None:
            return None
        alpha = float(self.lora_rank) if self.lora_alpha is None else self.lora_alpha
        return LoraPlan(self.lora_rank, alpha, self.lora_targets)

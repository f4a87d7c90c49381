"""How a student begins: what of its teacher it keeps, and what of it is trained.

- `exact` (the default) keeps the network as it is, with its own prediction and time. A diffusion
  network is then trained as the velocity field that it defines exactly, and before the first step
  the student's field is the teacher's, to the last bit.
- `reuse` reads the weights of a diffusion network as if they predicted velocity, as InstaFlow did
  (arXiv 2309.06380). A network is stored with diffusers' sign, u = noise - data, and is told
  1000 (1 - t) as its time; so what a U-Net gave for ε is taken for u, and v = -u. With that sign
  the noise's half of the target is right from the start, and the data's half is to be learned: the
  first loss is about E‖x_1‖². (With InstaFlow's own sign, v = data - noise taken from the same
  weights, it is E‖x_1 - 2 x_0‖², five times as much for unit variances, and the sign must be
  unlearned first. The last layer is linear, so the two differ by the sign of its weights.) Beside
  that, the network meets states (1 - t) x_0 + t x_1 that are smaller than those it was trained on
  by 1 / √(t² + (1 - t)²), √2 in the middle, at timesteps that meant another level of noise.

A network that predicts rectified velocity already begins as itself, either way.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from rectiflow.errors import InputError
from rectiflow.models.base import FlowModel
from rectiflow.models.lora import merge_loras, require_peft

Start = Literal["exact", "reuse"]
Stacking = Literal["shared", "separate"]

ADAPTER = "student"
"""What peft calls the LoRA of a student."""

GUIDANCE_FEATURES = 256
"""Width of a U-Net's embedding of the guidance scale (LCM, Luo et al. 2023, arXiv 2310.04378)."""


@dataclass(frozen=True)
class LoraPlan:
    """A LoRA to be trained in place of all weights (Hu et al. 2021, arXiv 2106.09685)."""

    rank: int
    alpha: float
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    """Endings of the names of linear layers and convolutions."""


def begin(
    model: FlowModel,
    *,
    start: Start = "exact",
    stacked: Stacking | None = None,
    keep_middle: bool = False,
    guidance_embedded: bool = False,
    lora: LoraPlan | None = None,
    seed: int = 0,
) -> FlowModel:
    """A student: a network of its own in float32, to be trained, around `model`'s other parts.

    Args:
        model: The teacher, or an earlier student; it is left as it is.
        start: `"exact"` or `"reuse"`.
        stacked: Make it two U-Nets in series, which share their weights or do not. That is another
            field than the teacher's from the start.
        keep_middle: Leave the tail of the first and the head of the second U-Net in.
        guidance_embedded: Give the network the guidance scale as an input.
        lora: Train a LoRA only.
        seed: Of the LoRA's first weights.

    Returns:
        A model of the same family, its text encoders and codec shared with `model`.

    Raises:
        InputError: The network cannot begin in this way.
    """
    if lora is not None:
        require_peft("a LoRA student")
    network = copy.deepcopy(model.network).float()
    if getattr(network, "peft_config", None):  # what is trained are weights, not what is beside
        merge_loras(network)
    network.requires_grad_(False)
    if guidance_embedded and not model.guidance_embeds:
        network = _with_guidance(network, model.name)
    if stacked is not None:
        network = _stacked(network, stacked, keep_middle)
    scheduler = None
    if start == "reuse" and model.prediction_type != "velocity":
        if model.prediction_type == "sample":
            raise InputError(
                f"{model.name} predicts the sample, which is of the other sign than noise - data: "
                "use start=exact"
            )
        scheduler = _rectified_scheduler(model)
    student = rebuilt(model, network, scheduler)
    if lora is None:
        student.network.requires_grad_(True)
    else:
        _add_lora(student.network, lora, seed)
    student.network.train()
    return student


def rebuilt(model: FlowModel, network: nn.Module, scheduler: Any = None) -> FlowModel:
    """The same model around another network, and perhaps another scheduler; nothing is copied.

    Args:
        model: Whose other parts it has.
        network: Takes the place of `model.network`.
        scheduler: Takes the place of the pipeline's; what the network predicts follows from it.
    """
    pipeline = model.pipeline
    parts = dict(pipeline.components)
    (name,) = (name for name, part in parts.items() if part is model.network)
    parts[name] = network
    if scheduler is not None:
        parts["scheduler"] = scheduler
    # What a pipeline is told beside its parts (requires_safety_checker) is in its configuration.
    known = inspect.signature(type(pipeline).__init__).parameters
    said = {key: value for key, value in pipeline.config.items() if key in known}
    said = {key: value for key, value in said.items() if key not in parts}
    return type(model)(type(pipeline)(**parts, **said), name=model.name, metadata=model.metadata)


def merged(model: FlowModel) -> FlowModel:
    """The model with a student's LoRA added into its weights; itself if there is none."""
    if not has_lora(model.network):
        return model
    network = copy.deepcopy(model.network)
    network.fuse_lora()
    network.unload_lora()
    return rebuilt(model, network)


def has_lora(network: nn.Module) -> bool:
    """Whether a LoRA of ours is in the network."""
    return ADAPTER in getattr(network, "peft_config", {})


def _add_lora(network: Any, plan: LoraPlan, seed: int) -> None:
    from peft import LoraConfig

    targets = list(plan.targets)
    if not any(name.endswith(tuple(targets)) for name, _ in network.named_modules()):
        raise InputError(f"lora_targets: no layer of the network ends in {', '.join(targets)}")
    settings = LoraConfig(r=plan.rank, lora_alpha=plan.alpha, target_modules=targets)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network.add_adapter(settings, adapter_name=ADAPTER)


def _with_guidance(network: Any, name: str) -> Any:
    """A U-Net that is told the guidance scale, and for a start does not listen."""
    from diffusers import UNet2DConditionModel

    if not isinstance(network, UNet2DConditionModel):
        raise InputError(f"guidance_embedded: {name} has no U-Net to give the guidance scale to")
    config = {**network.config, "time_cond_proj_dim": GUIDANCE_FEATURES}
    with torch.random.fork_rng(devices=[]):
        told = UNet2DConditionModel.from_config(config)
    missing, unexpected = told.load_state_dict(network.state_dict(), strict=False)
    assert not unexpected and missing == ["time_embedding.cond_proj.weight"]
    nn.init.zeros_(told.time_embedding.cond_proj.weight)
    return told.to(network.device).eval().requires_grad_(False)


def _stacked(network: Any, how: Stacking, keep_middle: bool) -> Any:
    """Two U-Nets in series, each with the weights of this one."""
    from rectiflow.models.stacked_unet import StackedUNet

    stacked = StackedUNet.from_unet(network, how == "shared", not keep_middle)
    return stacked.requires_grad_(False)


def _rectified_scheduler(model: FlowModel) -> Any:
    """The scheduler under which a U-Net is said to predict noise - data."""
    from rectiflow.models.schedulers import rectified_scheduler

    config = model.pipeline.scheduler.config
    return rectified_scheduler(num_train_timesteps=int(config.num_train_timesteps))

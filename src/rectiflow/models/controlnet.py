"""ControlNets beside a U-Net: pictures of the family that follow a picture of edges, depth, poses.

A ControlNet is a copy of the U-Net's down path that sees the control image too; what it has found
at each level is added to the U-Net's skip connections and middle. It is asked wherever the U-Net
is, so it acts under every solver and at any number of steps, one included. Source: Zhang et al.
2023, arXiv 2302.05543, and diffusers' `ControlNetModel`.
"""

from __future__ import annotations

import copy
import re
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from rectiflow.arguments import checked
from rectiflow.errors import InputError
from rectiflow.models.hub import first_sentence, hub_answers, refusal
from rectiflow.models.images import to_tensor
from rectiflow.models.libraries import quiet_libraries
from rectiflow.models.picture import Picture, load_image
from rectiflow.models.unet import UNetModel
from rectiflow.models.weights import check_finite

Model = TypeVar("Model", bound=UNetModel)

MUST_AGREE = ("cross_attention_dim", "block_out_channels", "layers_per_block", "in_channels")
"""What a ControlNet and the U-Net beside it have in common, as their configurations say."""


@checked
def with_control(
    model: Model,
    controlnet: str | Path | nn.Module,
    image: Picture,
    controlnet_conditioning_scale: float = 1.0,
) -> Model:
    """The same model under the control of an image; `model` itself is left as it is.

    What is returned goes wherever `model` would: `generate`, `invert`, any solver. Given to this
    function again, it has a second control, and their contributions add up. It shares all weights
    with `model`; its `weight_hash` is of ControlNet, image and scale too.

    Args:
        model: Of the Stable Diffusion family; a diffusion model or a rectified flow.
        controlnet: A folder, a hub id, or a `ControlNetModel`.
        image: What is to be followed, as the ControlNet was trained to see it; a file, a picture,
            or [1, 3, H, W] in [0, 1]. It is of the size of the pictures to be generated.
        controlnet_conditioning_scale: What its contribution is multiplied by.

    Raises:
        InputError: The ControlNet is not there, or is not for this model.
    """
    from diffusers import UNet2DConditionModel

    if not isinstance(model, UNetModel):
        raise InputError(f"{model.name} has no U-Net: ControlNets are for Stable Diffusion")
    unet = model.pipeline.unet
    if not isinstance(unet, UNet2DConditionModel):
        raise InputError(f"{model.name} has a {type(unet).__name__}: no ControlNet fits that")
    network = controlnet if isinstance(controlnet, nn.Module) else _load(controlnet, model)
    _check_fit(network, unet, model.name)
    control = Control(network, _as_tensor(image), controlnet_conditioning_scale).to(model.device)
    view: Any = copy.copy(model)
    view.__dict__.pop("weight_hash", None)  # the model's own, if it has been computed
    if not isinstance(view, _Controlled):
        view.__class__ = _controlled(type(model))
    view.controls = (*getattr(model, "controls", ()), control)
    view.controlled = ControlledUNet(unet, view.controls)
    return view


class Control(nn.Module):
    """A ControlNet, the image it looks at, and how strong it is.

    Args:
        network: A `ControlNetModel`.
        image: [1, 3, H, W] in [0, 1].
        scale: What its residuals are multiplied by.
    """

    def __init__(self, network: Any, image: Tensor, scale: float) -> None:
        super().__init__()
        self.network = network
        # Not weights, but they make another field of it, and so another hash.
        self.image: Tensor
        self.register_buffer("image", image)
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float32))
        self._scale = float(scale)

    @property
    def config(self) -> Any:
        """The ControlNet's."""
        return self.network.config

    def forward(
        self, sample: Tensor, timestep: Tensor, embeds: Tensor, **more: Any
    ) -> tuple[list[Tensor], Tensor]:
        """What is to be added to the U-Net's skip connections, and to its middle.

        Args:
            sample: The U-Net's input [B, C, h, w].
            timestep: [B].
            embeds: Text features [B, L, D].
            more: Added conditions.
        """
        image = self.image
        stride = 2 ** (len(self.network.config.conditioning_embedding_out_channels) - 1)
        size, wanted = list(image.shape[-2:]), [stride * side for side in sample.shape[-2:]]
        if size != wanted:
            raise InputError(
                f"the control image is {size[1]} × {size[0]} and the picture {wanted[1]} × "
                f"{wanted[0]}: make it the same size"
            )
        down, middle = self.network(
            sample,
            timestep,
            encoder_hidden_states=embeds,
            controlnet_cond=image.to(sample).expand(len(sample), -1, -1, -1),
            conditioning_scale=self._scale,
            return_dict=False,
            **more,
        )
        return list(down), middle


class ControlledUNet(nn.Module):
    """A U-Net that adds what its controls find; called as the U-Net is.

    Args:
        unet: A `UNet2DConditionModel`.
        controls: One or more.
    """

    def __init__(self, unet: Any, controls: tuple[Control, ...]) -> None:
        super().__init__()
        self.unet = unet
        self.controls = nn.ModuleList(controls)

    @property
    def config(self) -> Any:
        """The U-Net's."""
        return self.unet.config

    @property
    def dtype(self) -> torch.dtype:
        """The U-Net's."""
        return self.unet.dtype

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        **more: Any,
    ) -> Any:
        """As of the U-Net; the controls are told state, time, text and added conditions."""
        found = [
            control(sample, timestep, encoder_hidden_states, added_cond_kwargs=added_cond_kwargs)
            for control in self.controls
        ]
        downs, middles = zip(*found, strict=True)
        return self.unet(
            sample,
            timestep,
            encoder_hidden_states=encoder_hidden_states,
            added_cond_kwargs=added_cond_kwargs,
            down_block_additional_residuals=[sum(level) for level in zip(*downs, strict=True)],
            mid_block_additional_residual=sum(middles),
            **more,
        )


class _Controlled(UNetModel):
    """What differs in a model under control."""

    controls: tuple[Control, ...]
    controlled: ControlledUNet

    @property
    def network(self) -> Any:
        """The U-Net with its controls."""
        return self.controlled

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The pipeline's networks and the controls."""
        controls = {f"control_{i}": control for i, control in enumerate(self.controls)}
        return super().modules | controls


@cache
def _controlled(kind: type[UNetModel]) -> type[UNetModel]:
    """A kind of model under control."""
    return type(f"Controlled{kind.__name__}", (_Controlled, kind), {})


def _load(source: str | Path, model: UNetModel) -> Any:
    """A ControlNet from a folder or the hub, as the model's U-Net is: device, dtype, evaluation."""
    from diffusers import ControlNetModel
    from safetensors import SafetensorError

    folder, text = Path(source).expanduser(), str(source)
    local = folder.is_dir()
    if not local and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", text):
        raise InputError(f"there is no ControlNet {text}: give a folder or a hub id")
    try:
        with quiet_libraries():
            network = ControlNetModel.from_pretrained(
                str(folder) if local else text,
                dtype=model.dtype,
                use_safetensors=True,
                local_files_only=local or not hub_answers(text),
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise (
            refusal(text, error)
            or InputError(f"the ControlNet {text} cannot be loaded: {first_sentence(error)}")
        ) from error
    check_finite({"controlnet": network}, text)
    return network.to(model.device).eval().requires_grad_(False)


def _check_fit(network: Any, unet: Any, name: str) -> None:
    """Refuse a ControlNet of another kind of U-Net, or one that works in another way."""
    from diffusers import ControlNetModel

    if not isinstance(network, ControlNetModel):
        raise InputError(f"a {type(network).__name__} is no ControlNet: give a ControlNetModel")
    for key in MUST_AGREE:
        mine, its = (_plain(config[key]) for config in (unet.config, network.config))
        if mine != its:
            raise InputError(f"the ControlNet is not for {name}: its {key} is {its}, not {mine}")
    if network.config.global_pool_conditions:
        raise InputError("ControlNets that pool their findings (shuffle) are not supported")


def _plain(value: Any) -> Any:
    """A value of a configuration, whether it was read from a file or not."""
    return list(value) if isinstance(value, tuple | list) else value


def _as_tensor(image: Picture) -> Tensor:
    """The image as float32 [1, 3, H, W] in [0, 1]."""
    if not isinstance(image, Tensor):
        return to_tensor(load_image(image))
    if image.ndim != 4 or image.shape[:2] != (1, 3):
        raise InputError(
            f"a control image of shape {list(image.shape)}: give one of [1, 3, H, W] in [0, 1]"
        )
    return image.float()

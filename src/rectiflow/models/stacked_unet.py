"""Two U-Nets in series as one network: InstaFlow-1.7B's Stacked U-Net, and its variants.

What the first U-Net makes of a state is the second's input, at the same timestep and under the same
prompt; each has a time embedding and skip connections of its own. By default the middle is left
out, the first one's tail (`conv_norm_out`, its activation and `conv_out`) and the second one's head
(`conv_in`): instead of being squeezed into a latent of 4 channels and taken out of it again, the
features of the first one's last up block, of which there are as many channels as `conv_in` would
give, go straight into the second one's down path. Source: Liu et al. 2023, arXiv 2309.06380, which
finds that this pays after reflow, not before.

With P parameters in a U-Net and M of them in the middle (24,004 of SD 1.5's 859.5M) there are
2 P - M if the two have weights of their own, 2 P with the middle kept, and P if they share their
weights, whether or not the middle is used: the head that the second pass leaves out is the one that
the first begins with. Gradients of shared weights are the sum of those of both passes.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import FrozenDict, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn

from rectiflow.errors import InputError


class StackedUNet(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """Two `UNet2DConditionModel`s in series; it goes wherever one of them would.

    Its configuration has all that the configuration of one U-Net has, and the arguments below.

    Args:
        unet: Configuration of either U-Net.
        share: Let both be the same weights, used twice.
        remove_middle: Leave out the first one's tail and the second one's head.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = UNet2DConditionModel._no_split_modules

    @register_to_config
    def __init__(
        self, unet: dict[str, Any], share: bool = False, remove_middle: bool = True
    ) -> None:
        super().__init__()
        count = 1 if share else 2
        parts = [UNet2DConditionModel(**_public(unet)) for _ in range(count)]
        self.unets = nn.ModuleList(_without_middle(parts, remove_middle))

    @classmethod
    def from_unet(
        cls, unet: UNet2DConditionModel, share: bool = False, remove_middle: bool = True
    ) -> StackedUNet:
        """Begin with a pretrained U-Net's weights in both places.

        Args:
            unet: It is copied, with its dtype and device, and left as it is.
            share: As of the class.
            remove_middle: As of the class.

        Raises:
            InputError: It is no plain U-Net, or has a LoRA in it.
        """
        if not isinstance(unet, UNet2DConditionModel):
            raise InputError(f"a {type(unet).__name__} cannot be stacked: give a U-Net")
        if getattr(unet, "peft_config", None):
            raise InputError("a U-Net with a LoRA in it cannot be stacked: merge the LoRA first")
        if not remove_middle and unet.config.in_channels != unet.config.out_channels:
            raise InputError(
                f"this U-Net takes {unet.config.in_channels} channels and gives "
                f"{unet.config.out_channels}: without remove_middle it cannot follow itself"
            )
        with torch.device("meta"):  # random weights for a billion parameters take long
            stacked = cls(_public(unet.config), share, remove_middle)
        parts = [copy.deepcopy(unet) for _ in stacked.unets]
        stacked.unets = nn.ModuleList(_without_middle(parts, remove_middle))
        return stacked.train(unet.training)

    @property
    def config(self) -> FrozenDict:
        """That of one U-Net, and what says how there are two."""
        own = self._internal_dict
        return FrozenDict({**own["unet"], **own})

    @property
    def add_embedding(self) -> Any:
        """Of added conditions (SDXL): pipelines look up its size."""
        return self.unets[0].add_embedding

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        timestep_cond: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        return_dict: bool = True,
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        """As of `UNet2DConditionModel`; both U-Nets are told the same.

        Args:
            sample: States [B, C, h, w].
            timestep: One for all rows, or [B].
            encoder_hidden_states: Text features [B, L, D].
            timestep_cond: Embedded guidance scale [B, E].
            cross_attention_kwargs: For the attention processors.
            added_cond_kwargs: Of SDXL.
            return_dict: Whether to give an object rather than a tuple.

        Returns:
            The prediction [B, C, h, w], as `.sample` or as the only entry of a tuple.
        """
        first, second = self.unets[0], self.unets[-1]
        if self._internal_dict["share"] and self._internal_dict["remove_middle"]:
            first = _seen_with(first, conv_norm_out=None, conv_out=nn.Identity())
            second = _seen_with(second, conv_in=nn.Identity())
        told = {
            "encoder_hidden_states": encoder_hidden_states,
            "timestep_cond": timestep_cond,
            "cross_attention_kwargs": cross_attention_kwargs,
            "added_cond_kwargs": added_cond_kwargs,
            "return_dict": False,
        }
        (between,) = first(sample, timestep, **told)
        (prediction,) = second(between, timestep, **told)
        return UNet2DConditionOutput(sample=prediction) if return_dict else (prediction,)


def _public(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration without what diffusers notes in it for itself."""
    return {key: value for key, value in config.items() if not key.startswith("_")}


def _without_middle(parts: list[UNet2DConditionModel], remove: bool) -> list[UNet2DConditionModel]:
    """Two U-Nets, their middle taken out if it is to be; a single one has to keep all it has."""
    if remove and len(parts) == 2:
        parts[0].conv_norm_out, parts[0].conv_out = None, nn.Identity()
        parts[1].conv_in = nn.Identity()
    return parts


def _seen_with(unet: Any, **parts: nn.Module | None) -> Any:
    """The very same U-Net, seen as if it had other parts: nothing is copied and nothing changed."""
    view = copy.copy(unet)
    view._modules = {**unet._modules, **parts}
    # What has been put around the method (hooks of accelerate) is bound to the U-Net as it is.
    view.__dict__.pop("forward", None)
    return view

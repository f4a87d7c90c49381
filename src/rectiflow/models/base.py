"""The protocol: a pretrained network as a velocity field, with prompts, codec and hook points.

This is where diffusers' conventions end: above it t = 0 is noise and t = 1 is data, states are
float32, pixels lie in [0, 1] and a velocity points from noise to data.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rectiflow.errors import InputError
from rectiflow.flow.diffusion import VariancePreservingPath
from rectiflow.flow.grid import make_grid
from rectiflow.models.identity import fingerprint, identity_of
from rectiflow.models.images import SizePolicy
from rectiflow.models.metadata import Metadata
from rectiflow.models.prompts import Conditioning, TokenSegment
from rectiflow.models.sites import AttentionSite, Projection, joint_site
from rectiflow.models.weights import weight_hash

__all__ = [
    "AttentionSite",
    "Conditioning",
    "FlowModel",
    "Projection",
    "TokenSegment",
    "joint_site",
]


class FlowModel(ABC):
    """A text-to-image network as a velocity field, with its text encoders and codec.

    Args:
        pipeline: The diffusers pipeline that owns the components; it is used, never changed.
        name: What the model is called in reports and saved files.
        metadata: What its folder says about its use.
    """

    family: ClassVar[str]
    packed: ClassVar[bool] = False
    """Whether the family's pipelines pack latents into the tokens of the network, and what is said
    of them, by a method's authors too, is said of whole patches."""
    text_first: ClassVar[bool]
    """Whether joint attention concatenates [text, image] rather than [image, text]."""
    convention: ClassVar[str | None] = None
    """Of weights that are not asked as diffusers asks the family; as `load` takes it."""

    def __init__(
        self, pipeline: Any, *, name: str = "unnamed", metadata: Metadata | None = None
    ) -> None:
        self.pipeline = pipeline
        self.name = name
        self.metadata = metadata or Metadata()
        self.verified = False
        """Whether its files were compared with the checksums they were written with."""
        self.loaded_with: dict[str, Any] = {}
        """What `load` was told beside the name and the dtype: base, lora, variant, …, as given."""
        self.record: dict[str, Any] | None = None
        """Where it comes from, of a student whose folder need not be there."""
        self._dtype: tuple[tuple[nn.Module, torch.dtype], torch.dtype] | None = None

    # What the network is.

    @property
    @abstractmethod
    def network(self) -> Any:
        """The network, a module of diffusers: hooks that must see every evaluation go here."""

    @property
    def device(self) -> torch.device:
        """Where the network computes (under offloading, where it will be brought to)."""
        # diffusers looks at every module each time, for hooks that bring weights to a device: four
        # times a picture, as much as a tenth of a small one-step model. Weights that have not been
        # put off are where they compute. (`vars`, since diffusers takes its time to say that there
        # is no such attribute.)
        there: torch.device = next(self.network.parameters()).device
        off = vars(self.pipeline).get("_offload_device") or "_hf_hook" in vars(self.network)
        if off or there.type == "meta":
            return torch.device(self.pipeline._execution_device)
        return there

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the network computes in; states and velocities are float32 all the same."""
        # diffusers looks at every parameter each time, which costs as much as a small block does.
        network = self.network
        seen = (network, next(network.parameters()).dtype)
        if self._dtype is None or self._dtype[0] != seen:
            self._dtype = (seen, network.dtype)
        return self._dtype[1]

    @cached_property
    def weight_hash(self) -> str:
        """SHA-256 over the weights of network, codec and text encoders, as they are loaded.

        Computed on first use and kept: it names the model as it was then. A network loaded in
        another dtype is another velocity field and has another hash.
        """
        return weight_hash(self.modules)

    @property
    def identity(self) -> dict[str, Any]:
        """What the field, the codec and the prompts' tokens are beside the weights, as it is now:
        prediction type, noise schedule or shift, settings of every part; see `models.identity`.
        """
        return identity_of(self)

    @property
    def field_hash(self) -> str:
        """`identity` as a short hash: with `weight_hash`, what a result follows from."""
        return fingerprint(self.identity)

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The pipeline's networks by name."""
        components = self.pipeline.components
        return {name: part for name, part in components.items() if isinstance(part, nn.Module)}

    # Sizes and defaults.

    @property
    @abstractmethod
    def factor(self) -> int:
        """Pixels per latent cell, along one side."""

    @property
    @abstractmethod
    def patch(self) -> int:
        """Latent cells per image token, along one side."""

    @property
    @abstractmethod
    def largest(self) -> int:
        """The longest side of an image the network has positions for, in pixels."""

    @property
    @abstractmethod
    def channels(self) -> int:
        """Channels of a latent."""

    @property
    @abstractmethod
    def default_size(self) -> int:
        """Side of the square image the network was made for, in pixels."""

    @property
    @abstractmethod
    def default_guidance_scale(self) -> float:
        """The guidance its makers recommend."""

    @property
    @abstractmethod
    def default_num_inference_steps(self) -> int:
        """The number of steps its makers recommend."""

    @property
    @abstractmethod
    def shift(self) -> float:
        """The shift of the time grid its scheduler is configured with."""

    def shift_for(self, num_tokens: int) -> float:
        """The shift for an image of so many tokens: FLUX's depends on it, others' do not."""
        return self.shift

    @property
    def dynamic_shift(self) -> bool:
        """Whether the scheduler computes its shift from the image's size."""
        scheduler = getattr(self.pipeline, "scheduler", None)
        return bool(getattr(scheduler, "config", {}).get("use_dynamic_shifting", False))

    @property
    def default_solver(self) -> str:
        """What pictures are generated by: one of `flow.SOLVERS` or `schedulers.SCHEDULERS`."""
        return "euler"

    @property
    def default_grid(self) -> str:
        """Where solvers of ours stand still; as `generate_latents` takes it."""
        return "shifted"

    @property
    def cautions(self) -> tuple[str, ...]:
        """What to know before trusting an inversion or an edit by this model: whole sentences."""
        return ()

    @property
    def multiple(self) -> int:
        """Heights and widths are multiples of this, in pixels."""
        return self.factor * self.patch

    @property
    def size_policy(self) -> SizePolicy:
        """How images of other sizes are brought to this model; for `images.fit`."""
        return SizePolicy(multiple=self.multiple, largest=self.largest, area=self.default_size**2)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """The shape [C, h, w] of the latent of an image.

        Raises:
            InputError: The network cannot take an image of this size.
        """
        self.size_policy.check(height, width)
        return self.channels, height // self.factor, width // self.factor

    # Images and prompts.

    @abstractmethod
    def encode_image(self, images: Tensor) -> Tensor:
        """The latents of images: the mode of the posterior, normalised as the network sees them.

        Args:
            images: [B, 3, H, W] in [0, 1].

        Returns:
            float32 [B, C, h, w] on the model's device; the same for the same images, always.

        Raises:
            InputError: The network cannot take images of this size.
        """

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """The images of latents [B, C, h, w]: float32 [B, 3, H, W] in [0, 1]."""

    @abstractmethod
    def encode_prompt(self, prompts: str | Sequence[str]) -> Conditioning:
        """Embed prompts, each distinct one once and by itself.

        By itself, so that its embedding is the same to the last bit whatever else is asked for:
        a stored inversion depends on it. A prompt that is too long is cut, with a warning.
        """

    @abstractmethod
    def tokenize(self, prompts: str | Sequence[str]) -> list[TokenSegment]:
        """The tokens on every position of the text stream, segment after segment."""

    # The field.

    @abstractmethod
    def differentiable_velocity(self, x: Tensor, t: Tensor | float, cond: Conditioning) -> Tensor:
        """`v(x, t | c)`, from one call of the network on exactly the rows given.

        Args:
            x: States, [B, C, h, w].
            t: Time in [0, 1], 0 at noise: one for all rows, or [B].
            cond: B rows.

        Returns:
            float32 [B, C, h, w], pointing from noise to data; with gradients to `x`, `cond` and
            those weights of the network that require them.
        """

    def velocity(self, x: Tensor, t: Tensor | float, cond: Conditioning) -> Tensor:
        """`differentiable_velocity` without gradients: what solvers ask for."""
        with torch.no_grad():
            return self.differentiable_velocity(x, t, cond)

    @property
    def prediction_type(self) -> str:
        """What the network predicts: `"velocity"`, or of a diffusion model `"epsilon"`,
        `"v_prediction"` or `"sample"`, which its field is converted from.
        """
        return "velocity"

    @property
    def diffusion_path(self) -> VariancePreservingPath | None:
        """The path of a network that was trained as a diffusion model; None of a flow's."""
        return None

    @property
    def t_min(self) -> float:
        """The field's earliest time: below it, it is that of `t_min`. 0 but for a diffusion model,
        which has seen a little of the data even in its noisiest state.
        """
        return 0.0

    @property
    def t_max(self) -> float:
        """The field's latest time: above it, it is that of `t_max`."""
        return 1.0

    def initial_state(self, x_0: Tensor) -> Tensor:
        """The state at `t_min` to begin from with the noise `x_0` [B, C, h, w]: the noise itself,
        or of a diffusion model what diffusers begins from, brought to the straight path.
        """
        return x_0

    def student_grid(self, num_inference_steps: int) -> Tensor:
        """The grid on which a few-step student of this kind is trained and run.

        Returns:
            float32 [N + 1] on the CPU, rising, from `t_min` or a little later to 1.
        """
        side = self.default_size // self.multiple
        shift = self.shift_for(side * side)
        return make_grid("shifted", num_inference_steps, shift=shift)

    def leading_grid(self, num_inference_steps: int) -> Tensor:
        """Of a diffusion model, the grid of its scheduler at ``timestep_spacing="leading"``.

        Raises:
            InputError: It is no diffusion model, or there are not so many timesteps.
        """
        raise InputError(f"the grid 'leading' is of diffusion models, and {self.name} is a flow")

    @property
    def image_time(self) -> float:
        """The time of the state that an image is taken for on the grid `"leading"`."""
        return 1.0

    # Guidance.

    @property
    def guidance_embeds(self) -> bool:
        """Whether the network takes a guidance scale as an input (FLUX.1-dev), `guidance_scale`;
        classifier-free guidance is then `true_cfg_scale`, as in diffusers.
        """
        return False

    def combine(self, unguided: Tensor, guided: Tensor, scale: float) -> Tensor:
        """The guided velocity, `v(∅) + α (v(c) - v(∅))`, [B, C, h, w]."""
        return unguided + scale * (guided - unguided)

    # Hook points, for controls.

    @abstractmethod
    def attention_sites(self) -> list[AttentionSite]:
        """The attentions whose text stream goes on to a next block, in order."""

    def ending_site(self) -> AttentionSite | None:
        """The attention of a last block whose text stream ends there, where a family has one."""
        return None

    def every_site(self) -> list[AttentionSite]:
        """`attention_sites`, and after them the `ending_site`."""
        ending = self.ending_site()
        return [*self.attention_sites(), *([] if ending is None else [ending])]

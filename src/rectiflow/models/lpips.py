"""LPIPS on SqueezeNet 1.1 (Zhang et al., arXiv 1801.03924; Iandola et al., arXiv 1602.07360).

The packages that compute it need torchvision, which this project does without; the weights they
give are read from a safetensors file.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor, nn

from rectiflow.errors import InputError
from rectiflow.guarded import Unreadable, read_tensors

LAYERS = (1, 4, 7, 9, 10, 11, 12)
"""The features compared are the outputs of these parts of SqueezeNet."""
CHANNELS = (64, 128, 256, 384, 384, 512, 512)
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)


class Fire(nn.Module):
    """SqueezeNet's block: a 1 × 1 convolution, then 1 × 1 and 3 × 3 ones side by side."""

    def __init__(self, channels: int, squeezed: int, expanded: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, squeezed, 1)
        self.expand1x1 = nn.Conv2d(squeezed, expanded, 1)
        self.expand3x3 = nn.Conv2d(squeezed, expanded, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze(x).relu()
        return torch.cat([self.expand1x1(x), self.expand3x3(x)], dim=1).relu()


def squeezenet_features() -> nn.Sequential:
    """SqueezeNet 1.1 without its classifier, randomly initialised."""

    def halve() -> nn.Module:
        return nn.MaxPool2d(3, stride=2, ceil_mode=True)

    return nn.Sequential(
        nn.Conv2d(3, 64, 3, stride=2),
        nn.ReLU(),
        halve(),
        Fire(64, 16, 64),
        Fire(128, 16, 64),
        halve(),
        Fire(128, 32, 128),
        Fire(256, 32, 128),
        halve(),
        Fire(256, 48, 192),
        Fire(384, 48, 192),
        Fire(384, 64, 256),
        Fire(512, 64, 256),
    )


class Lpips(nn.Module):
    """The distance: squared differences of unit features, weighted by channel, averaged, summed."""

    def __init__(self) -> None:
        super().__init__()
        self.features = squeezenet_features()
        self.linear = nn.ModuleList(nn.Conv2d(size, 1, 1, bias=False) for size in CHANNELS)
        self.eval().requires_grad_(False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """The distance of each pair of pictures ``[B, 3, H, W]`` in [0, 1]: ``[B]``.

        It can be differentiated with respect to the pictures; its own weights stay as they are.
        """
        pairs = zip(self.linear, self._unit(a), self._unit(b), strict=True)
        layers = [weigh((f - g).square()).mean((1, 2, 3)) for weigh, f, g in pairs]
        return torch.stack(layers).sum(0)

    def _unit(self, images: Tensor) -> list[Tensor]:
        device = next(self.parameters()).device
        shift = torch.tensor(SHIFT, device=device)[:, None, None]
        scale = torch.tensor(SCALE, device=device)[:, None, None]
        x = (2 * images.to(device).float() - 1 - shift) / scale
        found = []
        for number, layer in enumerate(self.features):
            x = layer(x)
            if number in LAYERS:
                # Inside the root, as torchmetrics has it.
                found.append(x / (x.square().sum(1, keepdim=True) + 1e-8).sqrt())
        return found


def load_lpips(file: Path) -> Lpips:
    """LPIPS with the weights of a safetensors file.

    Args:
        file: of the state of ``lpips.LPIPS(net="squeeze")`` or of torchmetrics'
            ``LearnedPerceptualImagePatchSimilarity(net_type="squeeze").net``, written by
            ``safetensors.torch.save_model``.

    Raises:
        InputError: the file cannot be read or holds other weights.
    """
    try:
        stored, _ = read_tensors(file)
    except Unreadable as error:
        raise InputError(
            f"the LPIPS weights {file} cannot be read ({error.why}): write them by "
            'safetensors.torch.save_model(lpips.LPIPS(net="squeeze"), FILE)'
        ) from error
    model = Lpips()
    weights = {ours: value for name, value in stored.items() if (ours := _our_name(name))}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise InputError(
            f"{file} does not hold the weights of LPIPS with SqueezeNet: write them by "
            'safetensors.torch.save_model(lpips.LPIPS(net="squeeze"), FILE)'
        ) from error
    return model


def _our_name(name: str) -> str | None:
    """The name here of a weight of lpips or torchmetrics; None for constants."""
    if found := re.fullmatch(r"net\.slices?\.?\d+\.(\d+\..+)", name):
        return f"features.{found[1]}"
    # Both packages hold each of these under two names, of which the file keeps one.
    if found := re.fullmatch(r"lins?\.?(\d)\.model\.\d\.weight", name):
        return f"linear.{found[1]}.weight"
    return None

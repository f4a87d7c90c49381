"""The shared metrics against torchmetrics, scikit-image and plain numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.ndimage import correlate1d
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor
from torchmetrics.functional.image import (
    peak_signal_noise_ratio as torchmetrics_psnr,
)
from torchmetrics.functional.image import (
    structural_similarity_index_measure as torchmetrics_ssim,
)
from torchmetrics.multimodal import CLIPScore
from transformers import CLIPProcessor

from rectiflow.emoji.render import render_array
from rectiflow.emoji.scene import sample
from rectiflow.evaluate.emoji_models import Clip, load_clip
from rectiflow.evaluate.metrics import (
    clip_score,
    feature_distance,
    masked_mse,
    masked_psnr,
    masked_ssim,
    mse,
    psnr,
    ssim,
)
from rectiflow.models.load import WEIGHTS


@pytest.fixture(scope="module")
def pair() -> tuple[Tensor, Tensor]:
    """Scenes and the same with noise of three strengths, ``[3, 3, 48, 40]``."""
    draw = torch.Generator().manual_seed(0)
    pictures = [torch.from_numpy(render_array(sample(seed), 64)) for seed in (1, 2, 3)]
    clean = torch.stack(pictures).permute(0, 3, 1, 2)[..., :48, :40].float() / 255
    strengths = torch.tensor([0.02, 0.1, 0.3])[:, None, None, None]
    return (clean + strengths * torch.randn(clean.shape, generator=draw)).clamp(0, 1), clean


@pytest.fixture(scope="module")
def mask() -> Tensor:
    """A disc, everything, and nothing."""
    y, x = np.mgrid[:48, :40]
    disc = (y - 20) ** 2 + (x - 15) ** 2 < 100
    masks = np.stack([disc, np.ones_like(disc), np.zeros_like(disc)])
    return torch.from_numpy(masks)[:, None]


@pytest.fixture(scope="module")
def clip() -> Clip:
    return load_clip(WEIGHTS / "emoji-clip")


def _image(batch: Tensor, number: int) -> NDArray[np.float64]:
    return batch[number].permute(1, 2, 0).double().numpy()


def test_psnr_is_that_of_torchmetrics_and_scikit_image(pair: tuple[Tensor, Tensor]) -> None:
    a, b = pair
    for number, value in enumerate(psnr(a, b).tolist()):
        one, other = _image(a, number), _image(b, number)
        assert value == pytest.approx(peak_signal_noise_ratio(other, one, data_range=1), abs=1e-4)
        theirs = torchmetrics_psnr(a[number : number + 1], b[number : number + 1], data_range=1.0)
        assert value == pytest.approx(theirs.item(), abs=1e-4)
    torch.testing.assert_close(psnr(a, b), -10 * mse(a, b).log10())
    assert psnr(a, a).isinf().all()


def test_ssim_is_that_of_torchmetrics(pair: tuple[Tensor, Tensor]) -> None:
    a, b = pair
    theirs = torchmetrics_ssim(a, b, data_range=1.0, reduction="none")
    torch.testing.assert_close(ssim(a, b), theirs)
    torch.testing.assert_close(ssim(a, b).mean(), torchmetrics_ssim(a, b, data_range=1.0))


def test_ssim_is_that_of_scikit_image(pair: tuple[Tensor, Tensor]) -> None:
    """Of a plain numpy one too. scikit-image leaves the borders out, torchmetrics reflects them."""
    a, b = pair
    for number in range(3):
        value = structural_similarity(
            _image(b, number),
            _image(a, number),
            channel_axis=-1,
            data_range=1,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        full = _numpy_ssim(_image(a, number), _image(b, number))
        assert full[5:-5, 5:-5].mean() == pytest.approx(value, abs=1e-9)
        assert ssim(a, b)[number].item() == pytest.approx(full.mean(), abs=1e-4)


def _numpy_ssim(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Equation 13 of Wang et al. 2004 on every pixel and channel of ``[H, W, 3]``."""
    window = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    window /= window.sum()

    def blur(values: NDArray[np.float64]) -> NDArray[np.float64]:
        rows = correlate1d(values, window, axis=0, mode="mirror")
        return correlate1d(rows, window, axis=1, mode="mirror")

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    upper = (2 * mean_a * mean_b + 0.01**2) * (2 * covariance + 0.03**2)
    return upper / ((mean_a**2 + mean_b**2 + 0.01**2) * (var_a + var_b + 0.03**2))


@pytest.mark.parametrize("inside", [True, False])
def test_masked_metrics_are_those_of_numpy(
    pair: tuple[Tensor, Tensor], mask: Tensor, inside: bool
) -> None:
    a, b = pair
    errors = masked_mse(a, b, mask, inside=inside)
    ratios = masked_psnr(a, b, mask, inside=inside)
    similarities = masked_ssim(a, b, mask, inside=inside)
    for number in range(3):
        kept = mask[number, 0].numpy() == inside
        if not kept.any():
            assert errors[number].isnan() and ratios[number].isnan()
            assert similarities[number].isnan()
            continue
        one, other = _image(a, number), _image(b, number)
        error = ((one - other)[kept] ** 2).mean()
        assert errors[number].item() == pytest.approx(error, rel=1e-5)
        assert ratios[number].item() == pytest.approx(-10 * math.log10(error), abs=1e-4)
        pasted = np.where(kept[..., None], one, other)
        similarity = _numpy_ssim(pasted, other)[kept].mean()
        assert similarities[number].item() == pytest.approx(similarity, abs=1e-4)


def test_sides_of_a_mask_are_blind_to_each_other(pair: tuple[Tensor, Tensor], mask: Tensor) -> None:
    a, b = pair
    disc = mask[:1]
    changed = torch.where(disc, 1 - a[:1], a[:1])
    for metric in (masked_mse, masked_psnr, masked_ssim):
        assert torch.equal(
            metric(changed, b[:1], disc, inside=False), metric(a[:1], b[:1], disc, inside=False)
        )


def test_a_float_mask_is_a_bool_mask(pair: tuple[Tensor, Tensor], mask: Tensor) -> None:
    a, b = pair
    torch.testing.assert_close(
        masked_mse(a, b, mask.float(), inside=True),
        masked_mse(a, b, mask, inside=True),
        equal_nan=True,
    )


def test_clip_score_is_that_of_torchmetrics(clip: Clip) -> None:
    pictures = [torch.from_numpy(render_array(sample(seed), 64)) for seed in range(4)]
    eight_bit = torch.stack(pictures).permute(0, 3, 1, 2)
    texts = ["a red heart on a blue background", "two cats", "", "three green apples"]
    processor = CLIPProcessor(image_processor=clip.processor, tokenizer=clip.tokenizer)
    ours = clip_score(clip, eight_bit.float() / 255, texts)
    for number, text in enumerate(texts):
        metric = CLIPScore(model_name_or_path=lambda: (_OldFace(clip), processor))
        theirs = metric(eight_bit[number], text)
        assert ours[number].item() == pytest.approx(theirs.item(), abs=1e-3)


class _OldFace(torch.nn.Module):
    """A CLIP whose features are bare tensors, which torchmetrics 1.9 expects of transformers."""

    def __init__(self, clip: Clip) -> None:
        super().__init__()
        self.clip = clip.model
        self.config = clip.model.config

    def get_image_features(self, pixels: Tensor) -> Tensor:
        return self.clip.visual_projection(self.clip.vision_model(pixels).pooler_output)

    def get_text_features(self, ids: Tensor, attention: Tensor) -> Tensor:
        return self.clip.text_projection(self.clip.text_model(ids, attention).pooler_output)


def test_clip_score_knows_what_it_sees(clip: Clip) -> None:
    from rectiflow.emoji.caption import caption

    scenes = [sample(2_000_000 + n) for n in range(6)]
    pictures = torch.stack([torch.from_numpy(render_array(s, 64)) for s in scenes])
    images = pictures.permute(0, 3, 1, 2).float() / 255
    captions = [caption(scene) for scene in scenes]
    right = clip_score(clip, images, captions)
    wrong = clip_score(clip, images, captions[1:] + captions[:1])
    assert right.shape == (6,)
    assert (right > wrong).all()


def test_a_long_text_is_cut(clip: Clip) -> None:
    assert clip_score(clip, torch.rand(1, 3, 64, 64), ["a red heart " * 50]).isfinite().all()


def test_feature_distance_is_a_distance_of_pictures(
    clip: Clip, pair: tuple[Tensor, Tensor]
) -> None:
    a, b = pair
    distance = feature_distance(clip, a, b)
    assert distance.shape == (3,)
    assert distance[0] < distance[1] < distance[2] <= 4
    assert (feature_distance(clip, b, b) == 0).all()
    torch.testing.assert_close(feature_distance(clip, b, a), distance)


def test_feature_distance_by_hand(clip: Clip) -> None:
    """At the CLIP's own size, from stock transformers' hidden states, layer by layer."""
    images = [torch.from_numpy(render_array(sample(seed), 64)) for seed in (5, 6)]
    a, b = (image.permute(2, 0, 1)[None].float() / 255 for image in images)
    states = [
        clip.model.vision_model(2 * image - 1, output_hidden_states=True).hidden_states
        for image in (a, b)
    ]
    layers = []
    for f, g in list(zip(*states, strict=True))[1:]:
        f, g = f[0].detach().numpy(), g[0].detach().numpy()
        f, g = (v / np.linalg.norm(v, axis=-1, keepdims=True) for v in (f, g))
        layers.append(((f - g) ** 2).sum(-1).mean())
    assert feature_distance(clip, a, b).item() == pytest.approx(np.mean(layers), rel=1e-4)

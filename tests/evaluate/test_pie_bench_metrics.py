"""PIE-Bench's metrics against plain numpy, torchmetrics and stock transformers; tiny networks."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import Tensor
from torchmetrics.functional.image import lpips as torchmetrics_lpips
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure
from transformers import ViTConfig, ViTModel

from rectiflow.errors import InputError
from rectiflow.evaluate.metrics import clip_score
from rectiflow.evaluate.pie_bench_metrics import (
    Networks,
    load_networks,
    mean,
    score,
    summarise,
)
from rectiflow.evaluate.structure import MEAN, STD, structure_distance
from rectiflow.models.lpips import load_lpips, squeezenet_features

SIZE = 32


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random ViT of the real class, saved without a pooler as DINO's are."""
    folder = tmp_path_factory.mktemp("dino")
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=16,
        patch_size=4,
        qkv_bias=True,
        initializer_range=0.3,
    )
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reference() -> torch.nn.Module:
    """torchmetrics' LPIPS, with our features for those it has from torchvision, and random."""
    with pytest.MonkeyPatch.context() as patch:
        torch.manual_seed(0)
        features = squeezenet_features()
        patch.setattr(torchmetrics_lpips, "_get_tv_model_features", lambda *_: features)
        return torchmetrics_lpips._LPIPS(net="squeeze", use_dropout=True)


@pytest.fixture(scope="module")
def lpips_file(reference: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("lpips") / "squeeze.safetensors"
    save_model(reference, str(file))
    return file


@pytest.fixture(scope="module")
def networks(dino_folder: Path, lpips_file: Path) -> Networks:
    return load_networks(str(dino_folder), "emoji-clip", lpips_file)


@pytest.fixture(scope="module")
def pair() -> tuple[Tensor, Tensor]:
    """8-bit pictures, as files give them."""
    draw = torch.Generator().manual_seed(0)
    source = torch.rand(1, 3, SIZE, SIZE, generator=draw)
    result = (source + 0.1 * torch.randn(source.shape, generator=draw)).clamp(0, 1)
    return tuple((255 * image).round() / 255 for image in (source, result))  # type: ignore[return-value]


@pytest.fixture(scope="module")
def mask() -> Tensor:
    mask = torch.zeros(1, 1, SIZE, SIZE, dtype=torch.bool)
    mask[..., 8:20, 4:30] = True
    return mask


def test_the_background_as_the_authors_compute_it(
    pair: tuple[Tensor, Tensor], mask: Tensor
) -> None:
    source, result = pair
    found = score(Networks(), source, result, mask, "")["quirk"]
    black = (source * (1 - mask.float()), result * (1 - mask.float()))
    error = ((black[0] - black[1]).numpy().astype(float) ** 2).mean()
    assert found["background_mse"] == pytest.approx(error, rel=1e-5)
    assert found["background_psnr"] == pytest.approx(-10 * math.log10(error), abs=1e-4)
    psnr, ssim = (
        PeakSignalNoiseRatio(data_range=1.0),
        StructuralSimilarityIndexMeasure(data_range=1.0),
    )
    assert found["background_psnr"] == pytest.approx(psnr(black[1], black[0]).item(), abs=1e-4)
    assert found["background_ssim"] == pytest.approx(ssim(black[1], black[0]).item(), abs=1e-5)


def test_the_corrected_background_is_the_mean_over_it(
    pair: tuple[Tensor, Tensor], mask: Tensor
) -> None:
    source, result = pair
    found = score(Networks(), source, result, mask, "")
    kept = ~mask[0, 0].numpy()
    difference = (source - result)[0].numpy().astype(float)[:, kept]
    error = (difference**2).mean()
    assert found["corrected"]["background_mse"] == pytest.approx(error, rel=1e-5)
    assert found["corrected"]["background_psnr"] == pytest.approx(-10 * math.log10(error), abs=1e-4)
    # The quirk flatters by the share of the picture that is edited.
    share = kept.mean()
    quirk = found["quirk"]["background_mse"]
    assert quirk == pytest.approx(share * found["corrected"]["background_mse"], rel=1e-5)


def test_what_happens_inside_the_mask_is_not_background(
    networks: Networks, pair: tuple[Tensor, Tensor], mask: Tensor
) -> None:
    source, result = pair
    one = score(networks, source, result, mask, "a cat")
    other = score(networks, source, torch.where(mask, 1 - result, result), mask, "a cat")
    for variant in ("quirk", "corrected"):
        changed = {name for name in one[variant] if one[variant][name] != other[variant][name]}
        assert "structure_distance" in changed
        assert not {name for name in changed if name.startswith("background")}


def test_a_full_mask_has_no_background(networks: Networks, pair: tuple[Tensor, Tensor]) -> None:
    full = torch.ones(1, 1, SIZE, SIZE, dtype=torch.bool)
    some = torch.zeros_like(full)
    scores = [score(networks, *pair, mask, "a cat") for mask in (full, some)]
    for found in scores[0].values():
        for name, value in found.items():
            assert math.isnan(value) == name.startswith("background"), name
    summary = summarise(scores)
    for variant, found in summary.items():
        assert found["background_psnr"] == {
            "mean": scores[1][variant]["background_psnr"],
            "n": 1,
        }
        assert found["background_lpips"]["n"] == 1
        assert found["structure_distance"]["n"] == found["clip_whole"]["n"] == 2
    assert mean([math.nan]) == {"mean": None, "n": 0}


def test_clip_scores_of_the_whole_and_of_the_edited_part(
    networks: Networks, pair: tuple[Tensor, Tensor], mask: Tensor
) -> None:
    source, result = pair
    assert networks.clip is not None
    found = score(networks, source, result, mask, "a red heart")["quirk"]
    black = result * mask.float()
    for name, image in (("clip_whole", result), ("clip_edited", black)):
        wanted = clip_score(networks.clip, image, ["a red heart"]).item()
        assert found[name] == pytest.approx(wanted, abs=1e-3)


def test_lpips_is_that_of_torchmetrics(
    networks: Networks, reference: torch.nn.Module, pair: tuple[Tensor, Tensor], mask: Tensor
) -> None:
    """Its linear weights are the trained ones, which it brings along."""
    assert networks.lpips is not None
    source, result = (torch.nn.functional.interpolate(image, (96, 80)) for image in pair)
    wanted = reference(2 * result - 1, 2 * source - 1)
    assert wanted.item() > 0
    torch.testing.assert_close(networks.lpips(result, source), wanted.reshape(1))
    black = (image * (1 - mask.float()) for image in pair)
    wanted = reference(*(2 * image - 1 for image in black)).item()
    found = score(networks, *pair, mask, "")["quirk"]["background_lpips"]
    assert found == pytest.approx(wanted, rel=1e-4)


def test_squeezenet_has_its_published_size() -> None:
    """1 235 496 weights, 513 000 of them the classifier's; a picture is reduced 16-fold."""
    features = squeezenet_features()
    assert sum(weight.numel() for weight in features.parameters()) == 1_235_496 - 513_000
    assert features(torch.zeros(1, 3, 224, 224)).shape == (1, 512, 13, 13)


def test_lpips_takes_the_names_of_the_lpips_package(
    reference: torch.nn.Module, lpips_file: Path, tmp_path: Path
) -> None:
    stored = {}
    slices = reference.state_dict()
    for name, value in slices.items():
        if name.startswith("net.slices."):
            number, rest = name.removeprefix("net.slices.").split(".", 1)
            stored[f"net.slice{int(number) + 1}.{rest}"] = value.clone()
        elif name.startswith("lin") and not name.startswith("lins"):
            stored[name] = value.clone()
    stored["scaling_layer.shift"] = torch.zeros(1, 3, 1, 1)
    save_file(stored, tmp_path / "lpips.safetensors")
    one, other = load_lpips(lpips_file), load_lpips(tmp_path / "lpips.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("quirk", [True, False])
def test_structure_distance_by_hand(
    networks: Networks, pair: tuple[Tensor, Tensor], quirk: bool
) -> None:
    """From the hidden state before the last block, its norm and its map to keys."""
    dino = networks.dino
    last = dino.layers[-1]
    mean, std = (np.array(values)[:, None, None] for values in (MEAN, STD))
    tables = []
    for image in pair:
        scaled = torch.nn.functional.interpolate(
            image * (255 if quirk else 1), (16, 16), mode="bilinear", antialias=not quirk
        )
        pixels = torch.from_numpy((scaled[0].double().numpy() - mean) / std).float()[None]
        with torch.no_grad():
            state = dino(pixels, output_hidden_states=True).hidden_states[-2]
            keys = last.attention.k_proj(last.layernorm_before(state))[0].double().numpy()
        assert keys.shape == (1 + 16, 32)
        norms = np.linalg.norm(keys, axis=1)
        tables.append(keys @ keys.T / np.outer(norms, norms))
    wanted = ((tables[0] - tables[1]) ** 2).mean()
    found = structure_distance(dino, *pair, quirk=quirk).item()
    assert found == pytest.approx(wanted, rel=1e-3)
    assert structure_distance(dino, pair[0], pair[0], quirk=quirk).item() == 0


def test_the_variants_differ_where_they_should(
    networks: Networks, pair: tuple[Tensor, Tensor], mask: Tensor
) -> None:
    found = score(networks, *pair, mask, "a cat")
    for name in networks.metrics:
        alike = name.startswith("clip") or name == "background_lpips"
        assert (found["quirk"][name] == found["corrected"][name]) == alike, name


def test_what_is_missing_is_named_and_the_rest_computed(
    pair: tuple[Tensor, Tensor], mask: Tensor, lpips_file: Path
) -> None:
    some = load_networks(lpips=lpips_file)
    assert [text.split()[0] for text in some.missing] == ["DINO", "CLIP"]
    found = score(some, *pair, mask, "a cat", ["quirk"])
    assert list(found) == ["quirk"]
    assert set(found["quirk"]) == {
        "background_psnr",
        "background_mse",
        "background_ssim",
        "background_lpips",
    }


def test_networks_that_cannot_be_had_are_refused_in_a_line(
    dino_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "text.safetensors").write_text("no weights")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    refused = [
        {"dino": str(tmp_path)},
        {"clip": str(tmp_path / "none")},
        {"clip": str(dino_folder)},
        {"lpips": tmp_path / "none.safetensors"},
        {"lpips": tmp_path / "text.safetensors"},
        {"lpips": tmp_path / "other.safetensors"},
    ]
    for arguments in refused:
        with pytest.raises(InputError) as raised:
            load_networks(**arguments)  # type: ignore[arg-type]
        assert "\n" not in str(raised.value), arguments

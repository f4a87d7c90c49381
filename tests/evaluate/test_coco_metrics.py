"""COCO's figures against torch's resizer, torchmetrics' FID and transformers' own cosine."""

from __future__ import annotations

import csv
import hashlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.image.fid import FrechetInceptionDistance

from rectiflow.errors import InputError
from rectiflow.evaluate import coco_metrics
from rectiflow.evaluate.coco import Run
from rectiflow.evaluate.coco_data import read_coco
from rectiflow.evaluate.coco_emoji import make_emoji_coco
from rectiflow.evaluate.coco_metrics import (
    Networks,
    load_inception,
    load_networks,
    measure,
    resize,
    write_tables,
)
from rectiflow.evaluate.emoji_models import load_clip
from rectiflow.evaluate.frechet import GaussianStatistics
from rectiflow.models.images import to_tensor
from rectiflow.models.load import WEIGHTS
from rectiflow.models.picture import load_image
from rectiflow.report import save_png

N = 40


class Eye(nn.Module):
    """Five features of bytes, by a fixed random projection of blurred pictures."""

    num_features = 5

    def __init__(self) -> None:
        super().__init__()
        weight = torch.randn(5, 3 * 4 * 4, generator=torch.Generator().manual_seed(0))
        self.register_buffer("weight", weight)

    def forward(self, pixels: Tensor) -> Tensor:
        assert pixels.dtype == torch.uint8
        small = F.adaptive_avg_pool2d(pixels.float() / 255, 4)
        return small.flatten(1) @ self.weight.T


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Scenes, and in place of a model's pictures the same with noise, of another size."""
    folder, output = (tmp_path_factory.mktemp(name) for name in ("coco", "out"))
    make_emoji_coco(folder, N)
    made = Run(read_coco(folder), output, 1, 1.0, "euler")
    noise = np.random.default_rng(0)
    for image in made.data.images:
        with Image.open(image.picture) as opened:
            pixels = np.asarray(opened.resize((80, 80))) + noise.normal(0, 40, (80, 80, 3))
        record = {"command": "evaluate coco", "seed": image.number, "nfe": 1}
        picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        save_png(picture, made.file(image), record)
    made.settings_file.write_text('{"model": "noise"}')
    return made


@pytest.mark.parametrize(("width", "height", "size"), [(97, 70, 32), (40, 61, 64), (32, 32, 32)])
def test_the_resizer_is_antialiased_bicubic_in_floats(width: int, height: int, size: int) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8)
    side = min(width, height)
    top, left = (height - side) // 2, (width - side) // 2
    square = to_tensor(Image.fromarray(pixels))[..., top : top + side, left : left + side]
    known = F.interpolate(square, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
    found = to_tensor(resize(Image.fromarray(pixels), size))
    assert (255 * (found - known)).abs().max() < 0.501  # rounded once, at the end


def test_fid_is_that_of_torchmetrics(run: Run) -> None:
    figures, _ = measure(run, Networks(inception=Eye(), inception_size=48))
    fid = FrechetInceptionDistance(feature=Eye())
    for real in (True, False):
        files = [i.picture if real else run.file(i) for i in run.data.images]
        seen = [np.asarray(resize(load_image(file), 48)) for file in files]
        fid.update(torch.from_numpy(np.stack(seen)).permute(0, 3, 1, 2), real=real)
    found = figures["metrics"]["fid"]
    assert found["value"] == pytest.approx(fid.compute().item(), rel=1e-4)
    assert found["value"] > 0.01 and found["dimensions"] == 5
    kept = GaussianStatistics.load(run.output / found["reference_file"], found["reference_hash"])
    assert kept.count == N
    assert set(figures["left_out"]) == {"Fréchet distance in CLIP features", "CLIP score"}


def test_clip_score_is_the_cosine_of_transformers(run: Run) -> None:
    clip = load_clip(WEIGHTS / "emoji-clip")
    figures, rows = measure(run, Networks(clip=clip, clip_name="emoji-clip"))
    images = run.data.images[:5]
    pictures = [resize(load_image(run.file(image)), 64) for image in images]
    pixels = clip.processor(images=pictures, return_tensors="pt")["pixel_values"]
    tokens = clip.tokenizer([i.caption for i in images], padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = clip.model(pixel_values=pixels, **tokens).logits_per_image
    known = (logits / clip.model.logit_scale.exp()).diagonal()
    found = [row["clip_score"] for row in rows[:5]]
    assert found == pytest.approx(known.tolist(), abs=1e-5)
    score = figures["metrics"]["clip_score"]
    assert score["value"] == pytest.approx(np.mean([row["clip_score"] for row in rows]))
    low, high = score["interval"]
    assert low < score["value"] < high < score["references"] < 1
    distance = figures["metrics"]["frechet_clip"]
    assert "emoji-clip" in distance["title"] and "FID" not in distance["title"]
    assert distance["value"] > distance["standard_error"] > 0


def test_nothing_is_made_up_without_networks(run: Run) -> None:
    figures, rows = measure(run, Networks())
    assert figures["metrics"] == {} and figures["n"] == N
    assert list(figures["left_out"]) == ["FID", "Fréchet distance in CLIP features", "CLIP score"]
    write_tables(run, figures, rows)
    with (run.output / "figures.csv").open() as opened:
        table = list(csv.DictReader(opened))
    assert [row["left_out"] for row in table] == [
        "needs --inception-weights",
        "needs --clip",
        "needs --clip",
    ]
    with (run.output / "per-image.csv").open() as opened:
        assert [int(row["id"]) for row in csv.DictReader(opened)] == [
            image.id for image in run.data.images
        ]


def test_pictures_of_others_are_refused(run: Run) -> None:
    file = run.file(run.data.images[0])
    own = file.read_bytes()
    save_png(Image.new("RGB", (8, 8)), file, {"command": "generate"})
    try:
        with pytest.raises(InputError, match="not written by this"):
            measure(run, Networks())
    finally:
        file.write_bytes(own)


def test_only_the_inception_of_the_fid_is_opened(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        load_networks(tmp_path / "none.pth")
    (tmp_path / "other.pth").write_bytes(b"any")  # a pickle runs what is in it
    with pytest.raises(InputError, match=r"not the Inception of the FID.*6726825d"):
        load_networks(tmp_path / "other.pth")


def pinned(file: Path, patch: pytest.MonkeyPatch) -> Path:
    """A file taken for the published one."""
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    patch.setattr(coco_metrics, "INCEPTION_SHA256", digest)
    return file


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    (tmp_path / "empty.pth").write_bytes(b"")
    with pytest.raises(InputError, match="torch-fidelity and torchvision"):
        load_networks(pinned(tmp_path / "empty.pth", monkeypatch))


def test_inception_of_torch_fidelity(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With random weights, where the packages are installed."""
    kind = pytest.importorskip("torch_fidelity", exc_type=ImportError).FeatureExtractorInceptionV3
    file = tmp_path / "inception.pth"
    torch.save({}, file)
    with monkeypatch.context() as patch:
        patch.setattr(kind, "load_state_dict", lambda self, weights: None)
        weights = load_inception(pinned(file, patch)).state_dict()
    torch.save(weights, file)
    networks = load_networks(pinned(file, monkeypatch))
    files = [run.file(image) for image in run.data.images[:2]]
    seen = np.stack([np.asarray(resize(load_image(file), 299)) for file in files])
    known = FrechetInceptionDistance(2048, feature_extractor_weights_path=str(file)).inception
    with torch.no_grad():
        features = known(torch.from_numpy(seen).permute(0, 3, 1, 2))
    assert features.shape == (2, 2048) and features.std() > 0
    assert np.allclose(coco_metrics._inception_features(networks, files), features, atol=1e-5)

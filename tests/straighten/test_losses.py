"""Losses: their limits, their gradients through codecs, and the two kinds of picture distance."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_model
from torch import Tensor
from transformers import CLIPModel

from rectiflow.errors import InputError
from rectiflow.models import SD3Model
from rectiflow.models.load import WEIGHTS
from rectiflow.models.lpips import Lpips
from rectiflow.straighten import losses
from tests.tiny import tiny_model
from tests.tiny_qwen import tiny_qwen_model as tiny_qwen


@pytest.fixture(scope="module")
def model() -> SD3Model:
    return tiny_model()


@pytest.fixture(scope="module")
def lpips_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LPIPS with random weights, in a file as `load_lpips` reads them."""
    torch.manual_seed(0)
    network = Lpips()
    for weight in network.linear.parameters():
        weight.abs_()
    state = {}
    for name, value in network.state_dict().items():
        part, rest = name.split(".", 1)
        if part == "features":
            state[f"net.slices.0.{rest}"] = value
        else:
            state[f"lins.{rest.split('.')[0]}.model.1.weight"] = value
    from safetensors.torch import save_file

    file = tmp_path_factory.mktemp("lpips") / "lpips.safetensors"
    save_file({name: value.clone() for name, value in state.items()}, file)
    return file


def test_l2_is_the_mean_square_per_dimension() -> None:
    z = torch.randn(3, 4, 5, 6)
    torch.testing.assert_close(losses.l2(z), z.pow(2).mean((1, 2, 3)))


def test_pseudo_huber_between_its_limits() -> None:
    z = torch.randn(4, 4, 8, 8, dtype=torch.float64)
    d = z[0].numel()
    c = losses.HUBER * d
    norm = z.flatten(1).norm(dim=1)
    literal = ((norm.square() + c**2).sqrt() - c) / d
    torch.testing.assert_close(losses.pseudo_huber(z), literal.float())
    small = losses.pseudo_huber(1e-5 * z)
    torch.testing.assert_close(small, ((1e-5 * norm) ** 2 / (2 * c * d)).float(), rtol=1e-3, atol=0)
    assert bool((small > 0).all())  # where √(s + t²) - t is 0 in float32
    large = losses.pseudo_huber(1e5 * z)
    torch.testing.assert_close(large, (1e5 * norm / d).float(), rtol=1e-4, atol=0)
    zero = torch.zeros(1, 3, requires_grad=True)
    losses.pseudo_huber(zero).sum().backward()
    assert zero.grad is not None and torch.equal(zero.grad, torch.zeros(1, 3))


@pytest.mark.parametrize("kind", ["lpips", "clip"])
def test_pictures_in_chunks_are_pictures_at_once(
    model: SD3Model, lpips_file: Path, kind: str
) -> None:
    weights = lpips_file if kind == "lpips" else WEIGHTS / "emoji-clip"
    distance = losses.picture_distance(weights, torch.device("cpu"))
    a, b = torch.randn(5, 4, 16, 16), torch.randn(5, 4, 16, 16)

    def run(chunk: int) -> tuple[Tensor, Tensor]:
        x = a.clone().requires_grad_()
        found = losses.Perceptual(model, distance, chunk)(x, b)
        (found * torch.arange(1.0, 6.0)).sum().backward()
        assert x.grad is not None
        return found.detach(), x.grad

    whole, gradient = run(5)
    assert whole.shape == (5,) and bool((whole > 0).all())
    assert bool((gradient.flatten(1).norm(dim=1) > 0).all())
    for chunk in (1, 2):
        found, other = run(chunk)
        torch.testing.assert_close(found, whole)
        torch.testing.assert_close(other, gradient, rtol=1e-4, atol=1e-7)
    # The same without checkpointing, from the parts themselves.
    x = a.clone().requires_grad_()
    decode = losses.decoder(model)
    plain = distance(decode(x), decode(b))
    torch.testing.assert_close(plain.detach(), whole)
    (plain * torch.arange(1.0, 6.0)).sum().backward()
    torch.testing.assert_close(x.grad, gradient, rtol=1e-4, atol=1e-7)
    assert float(losses.Perceptual(model, distance)(b, b).max()) < 1e-6


def test_a_chunk_at_a_time_is_kept(model: SD3Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is decoded is decoded again for the gradient, never more rows than a chunk at once."""
    rows = []
    inner = model.pipeline.vae.decode

    def spy(latents: Tensor, **kwargs: object) -> object:
        rows.append(len(latents))
        return inner(latents, **kwargs)

    monkeypatch.setattr(model.pipeline.vae, "decode", spy)
    distance = losses.picture_distance(WEIGHTS / "emoji-clip", torch.device("cpu"))
    x = torch.randn(6, 4, 8, 8, requires_grad=True)
    losses.Perceptual(model, distance, chunk=2)(x, torch.randn(6, 4, 8, 8)).sum().backward()
    assert rows == [2] * 12


def test_clip_distance_is_between_its_features() -> None:
    """Against the definition, from transformers' own model and preprocessing."""
    folder = WEIGHTS / "emoji-clip"
    distance = losses.picture_distance(folder, torch.device("cpu"))
    a, b = torch.rand(2, 3, 64, 64), torch.rand(2, 3, 64, 64)
    clip = CLIPModel.from_pretrained(folder, dtype=torch.float32)
    features = []
    for images in (a, b):
        hidden = clip.vision_model(2 * images - 1, output_hidden_states=True).hidden_states[1:]
        features.append([h / h.norm(dim=-1, keepdim=True) for h in hidden])
    cosines = torch.stack([(f * g).sum(-1).mean(1) for f, g in zip(*features, strict=True)])
    torch.testing.assert_close(distance(a, b), (2 - 2 * cosines).mean(0), rtol=1e-4, atol=1e-5)
    named = losses.picture_distance(Path("emoji-clip"), torch.device("cpu"))
    assert torch.equal(named(a, b), distance(a, b))
    # Any size will do, and shape counts more than a small shift of brightness.
    smooth = torch.nn.functional.interpolate(torch.rand(2, 3, 4, 4), (64, 64), mode="bilinear")
    bright = (smooth + 0.02).clamp(0, 1)
    assert bool((distance(smooth, bright) < distance(smooth, smooth.flip(2))).all())
    assert distance(torch.rand(1, 3, 96, 80), torch.rand(1, 3, 96, 80)).shape == (1,)


def test_missing_weights_and_codecs_are_one_line(model: SD3Model, tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    with pytest.raises(InputError, match="lpips_weights=FILE"):
        losses.picture_distance(None, cpu)
    with pytest.raises(InputError, match=r"there is no .*nowhere"):
        losses.picture_distance(tmp_path / "nowhere.safetensors", cpu)
    with pytest.raises(InputError, match="does not hold a CLIPModel"):
        losses.picture_distance(tmp_path, cpu)
    save_model(torch.nn.Linear(1, 1), str(tmp_path / "other.safetensors"))
    with pytest.raises(InputError, match="does not hold the weights of LPIPS"):
        losses.picture_distance(tmp_path / "other.safetensors", cpu)
    with pytest.raises(InputError, match="no codec"):
        losses.decoder(tiny_qwen())

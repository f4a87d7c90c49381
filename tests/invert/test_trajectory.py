"""Inversions of whole pictures on tiny random models: exact reconstruction, cost, files."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from rectiflow.errors import InputError, WorkError
from rectiflow.flow.grid import make_grid
from rectiflow.flow.solver import integrate
from rectiflow.invert import Inversion, from_seed, get_preset, invert
from rectiflow.invert.inverting import grid_for, invert_latents
from rectiflow.invert.result import InversionResult
from rectiflow.models import SD3Model
from rectiflow.models.generate import generate
from rectiflow.models.guidance import GuidedVelocity
from rectiflow.sealed import save_sealed
from tests.tiny import tiny_model

STEPS = 6
# What the shipped presets are told may be tuned; these are the schemes themselves.
SOLVED: dict[str, Any] = {"preset": "euler", "scheme": "fixed_point", "warm_start": True}


@pytest.fixture(scope="module")
def model() -> SD3Model:
    return tiny_model()


@pytest.fixture(scope="module")
def medium() -> SD3Model:
    return tiny_model(t5=True, medium=True)


@contextmanager
def counting(model: SD3Model) -> Iterator[list[int]]:
    """The rows of each call of the network."""
    calls: list[int] = []

    def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        calls.append(len(kwargs["hidden_states"]))

    handle = model.network.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def pictures() -> dict[str, Image.Image]:
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:40, :24]
    board = ((x // 4 + y // 4) % 2 * 255).astype(np.uint8)
    return {
        "photograph": Image.fromarray(skimage.data.astronaut()),
        "wide photograph": Image.fromarray(skimage.data.coffee()),
        "white noise": Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)),
        "checkerboard": Image.fromarray(board).convert("RGB"),
        "one pixel": Image.new("RGB", (1, 1), "red"),
        "black": Image.new("RGB", (32, 32)),
    }


@pytest.mark.parametrize("preset", ["exact", "ftedit", "euler"])
@pytest.mark.parametrize("name", pictures())
def test_any_picture_comes_back_exactly(
    model: SD3Model, medium: SD3Model, name: str, preset: str
) -> None:
    picture = pictures()[name]
    for chosen in (model, medium) if name == "wide photograph" else (model,):
        inversion = invert(chosen, picture, "red apple", preset=preset, num_inference_steps=STEPS)
        again = inversion.reconstruct()
        assert again.max_abs_latent < 1e-4
        assert (again.latents - inversion.latents).abs().max() < 1e-4
        assert again.image.size == picture.size
        decoded = np.asarray(inversion.images(inversion.latents)[0]).astype(int)
        assert np.abs(np.asarray(again.image) - decoded).max() <= 1
        assert again.nfe == STEPS and again.compensation.shape == (STEPS,)
        assert inversion.trajectory.shape[:2] == (STEPS + 1, 1)
        assert inversion.trajectory.dtype == torch.float32


def test_compensation_is_what_the_inversion_missed(model: SD3Model) -> None:
    """Solved to a tolerance nothing is missed; the paper's average and Euler's step miss a lot."""
    cases: dict[str, dict[str, Any]] = {
        "rounding": SOLVED | {"iterations": 50, "tolerance": 1e-7},
        "solved": SOLVED | {"iterations": 10, "tolerance": 1e-3},
        "exact": {"preset": "exact"},  # as it is shipped
        "ftedit": {"preset": "ftedit", "grid": "shifted"},
        "euler": {"preset": "euler"},
    }
    errors, sizes = {}, {}
    for name, settings in cases.items():
        inversion = invert(
            model, pictures()["photograph"], "red apple", num_inference_steps=STEPS, **settings
        )
        errors[name] = inversion.reconstruct(compensate=False).max_abs_latent
        sizes[name] = inversion.reconstruct().compensation.max().item()
    assert errors["rounding"] < 1e-5 and sizes["rounding"] < 1e-5
    assert errors["solved"] < 5e-3 and sizes["solved"] < 5e-3
    for measured in (errors, sizes):
        for name in ("solved", "exact"):
            assert 10 * measured[name] < measured["ftedit"] < measured["euler"]
    assert errors["exact"] < 0.05 * errors["euler"]


def test_reconstruction_follows_the_models_own_field(model: SD3Model) -> None:
    inversion = invert(
        model, pictures()["photograph"], "cat", preset="euler", num_inference_steps=STEPS
    )
    field = GuidedVelocity(model, model.encode_prompt("cat"))
    free = integrate(field, inversion.noise, inversion.grid).x
    torch.testing.assert_close(inversion.reconstruct(False).latents, free)


def test_the_field_is_conditional_and_unguided(model: SD3Model) -> None:
    """One step of Euler's inversion, written out."""
    picture = pictures()["white noise"]
    inversion = invert(
        model, picture, "two cats", preset="euler", num_inference_steps=1, guidance_scale=5.0
    )
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255
    latents = model.encode_image(pixels)
    expected = latents - model.velocity(latents, 1.0, model.encode_prompt("two cats"))
    torch.testing.assert_close(inversion.latents, latents)
    torch.testing.assert_close(inversion.noise, expected)


def test_grids(model: SD3Model) -> None:
    latents = torch.zeros(1, 4, 8, 8)
    for name in ("uniform", "shifted", "dynamic", "diffusers"):
        grid = grid_for(model, get_preset("exact", grid=name, num_inference_steps=5), latents)
        expected = make_grid(name, 5, shift=3.0, num_tokens=16)
        assert torch.equal(grid, expected) and grid.dtype == torch.float32
    with pytest.raises(InputError, match="unknown grid 'log'"):
        invert(model, pictures()["black"], grid="log")


@pytest.mark.parametrize(
    ("settings", "each"),
    [
        ({"preset": "exact"}, 1),
        ({"preset": "ftedit"}, 3),
        ({"preset": "euler"}, 1),
        (SOLVED | {"iterations": 8, "tolerance": 1e-3}, None),
    ],
)
def test_nfe_is_what_went_through_the_network(
    model: SD3Model, settings: dict[str, Any], each: int | None
) -> None:
    with counting(model) as calls:
        inversion = invert(
            model, pictures()["photograph"], "cat", num_inference_steps=STEPS, **settings
        )
    assert inversion.nfe == sum(calls)
    assert each is None or inversion.nfe == each * STEPS
    # What a scheme does not know is left out, and not a number that is none.
    known = inversion.preset.scheme == "fixed_point"
    assert len(inversion.residuals) == (STEPS if known else 0) and inversion.seconds > 0
    assert (inversion.residual is None) == (not known)
    with counting(model) as calls:
        assert inversion.reconstruct().nfe == sum(calls) == STEPS


def test_several_pictures_at_once_are_as_one_by_one(model: SD3Model) -> None:
    """Each row has a prompt of its own, converges when it does, and is then left out."""
    settings = SOLVED | {"iterations": 8, "tolerance": 1e-4}
    preset = get_preset(num_inference_steps=STEPS, **settings)
    latents = torch.randn(3, 4, 8, 8) * torch.tensor([0.3, 1.0, 3.0]).view(3, 1, 1, 1)
    grid = grid_for(model, preset, latents)
    cond = model.encode_prompt(["red apple", "cat", "two green lemons on the left"])
    with counting(model) as calls:
        together = invert_latents(GuidedVelocity(model, cond), latents, grid, preset)
    assert sum(calls) == together.evaluations.sum() and min(calls) < 3
    assert (together.residuals <= 1e-4).all()
    for row in range(3):
        alone = invert_latents(GuidedVelocity(model, cond[row]), latents[[row]], grid, preset)
        torch.testing.assert_close(
            alone.trajectory[:, 0], together.trajectory[:, row], atol=1e-5, rtol=0
        )
        assert torch.equal(alone.evaluations[:, 0], together.evaluations[:, row])
    # With guidance, and the same prompt for all.
    guided = GuidedVelocity(model, cond[0], None, 2.0)
    together = invert_latents(guided, latents, grid, preset)
    alone = invert_latents(guided, latents[[1]], grid, preset)
    torch.testing.assert_close(alone.trajectory[:, 0], together.trajectory[:, 1], atol=1e-5, rtol=0)


def test_a_network_in_half_precision_keeps_a_float32_state() -> None:
    model = tiny_model(dtype=torch.bfloat16)
    for preset in ("exact", "ftedit", "euler"):
        inversion = invert(
            model, pictures()["photograph"], "cat", preset=preset, num_inference_steps=STEPS
        )
        assert inversion.trajectory.dtype == torch.float32
        assert not torch.equal(inversion.trajectory, inversion.trajectory.bfloat16().float())
        assert inversion.reconstruct().max_abs_latent < 1e-4


def test_no_prompt_is_the_empty_one(model: SD3Model) -> None:
    one = invert(model, pictures()["black"], num_inference_steps=2)
    other = invert(model, pictures()["black"], "", num_inference_steps=2)
    assert one.source_prompt == "" and torch.equal(one.trajectory, other.trajectory)


def test_noise_statistics(model: SD3Model) -> None:
    inversion = invert(model, pictures()["white noise"], num_inference_steps=2)
    noise: Tensor = inversion.noise
    assert inversion.noise_statistics.norm == pytest.approx(noise.square().mean().sqrt().item())


def test_a_broken_network_is_named() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.network.proj_out.weight.fill_(torch.nan)
    with pytest.raises(WorkError, match="tiny returned numbers that are not finite"):
        invert(model, pictures()["black"], num_inference_steps=2)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_generated_picture_needs_no_inversion(model: SD3Model, guidance: float) -> None:
    settings: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": guidance}
    with counting(model) as calls:
        inversion = from_seed(model, "red apple", 7, height=32, width=40, **settings)
    assert inversion.nfe == sum(calls) == STEPS * (1 if guidance == 1 else 2)
    expected = generate(model, "red apple", seed=7, height=32, width=40, **settings)[0]
    assert np.array_equal(np.asarray(inversion.images(inversion.latents)[0]), np.asarray(expected))
    plain = inversion.reconstruct(compensate=False)
    assert plain.max_abs_latent < 1e-5 and plain.image.size == (40, 32)
    assert inversion.reconstruct().compensation.max() < 1e-4
    assert inversion.seed == 7 and inversion.residual == 0
    with pytest.raises(InputError, match="height 30"):
        from_seed(model, "cat", 0, height=30, **settings)


@pytest.fixture(scope="module")
def saved(model: SD3Model, tmp_path_factory: pytest.TempPathFactory) -> tuple[Inversion, Path]:
    inversion = invert(
        model,
        pictures()["wide photograph"],
        "red äpple",
        num_inference_steps=3,
        iterations=2,
        stop_at_query=True,
        **SOLVED,
    )
    folder = tmp_path_factory.mktemp("inversions") / "new"
    return inversion, inversion.save(folder / "x.safetensors")


def test_saved_and_loaded_bit_for_bit(model: SD3Model, saved: tuple[Inversion, Path]) -> None:
    inversion, path = saved
    assert [file.name for file in path.parent.iterdir()] == ["x.safetensors"]
    loaded = Inversion.load(path, model)
    for field in dataclasses.fields(Inversion):
        if field.name not in ("path", "grid"):
            assert getattr(inversion, field.name) == getattr(loaded, field.name)
    assert torch.equal(inversion.grid, loaded.grid)
    for field in dataclasses.fields(InversionResult):
        one, other = getattr(inversion.path, field.name), getattr(loaded.path, field.name)
        assert torch.equal(one, other) if isinstance(one, Tensor) else one is other
    again, other = inversion.reconstruct(), loaded.reconstruct()
    assert torch.equal(again.latents, other.latents)
    assert again.image.tobytes() == other.image.tobytes()
    states = {"trajectory", "grid", "residuals", "evaluations", "velocities"}
    assert states <= set(load_file(path)) and "offsets" not in load_file(path)


def test_unknown_residuals_survive(model: SD3Model, tmp_path: Path) -> None:
    inversion = invert(model, pictures()["black"], preset="euler", num_inference_steps=2)
    loaded = Inversion.load(inversion.save(tmp_path / "x"), model)
    assert loaded.residuals == () and loaded.residual is None


def test_another_models_inversion_is_refused(saved: tuple[Inversion, Path]) -> None:
    for other in (tiny_model(seed=1), tiny_model(dtype=torch.bfloat16)):
        with pytest.raises(InputError, match=r"was made with tiny \(weights .* not with") as caught:
            Inversion.load(saved[1], other)
        assert "\n" not in str(caught.value)


def test_what_is_not_an_inversion_is_refused(
    model: SD3Model, saved: tuple[Inversion, Path], tmp_path: Path
) -> None:
    (tmp_path / "text").write_text("hello")
    (tmp_path / "empty").touch()
    (tmp_path / "half").write_bytes(saved[1].read_bytes()[:-100])
    tensors = load_file(saved[1])
    save_file(tensors, tmp_path / "bare")
    save_file(tensors, tmp_path / "foreign", {"rectiflow": "[1]"})
    save_file({"x": torch.ones(1)}, tmp_path / "weights", {"rectiflow": '{"format": 2}'})
    messages = {
        name: "is not a saved inversion"
        for name in ("text", "empty", "half", "bare", "foreign", "weights", ".")
    }
    messages["nowhere"] = "no inversion at"
    for name, message in messages.items():
        with pytest.raises(InputError, match=message) as caught:
            Inversion.load(tmp_path / name, model)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("version", [1, 99])
def test_another_formats_inversion_is_named(
    saved: tuple[Inversion, Path], model: SD3Model, tmp_path: Path, version: int
) -> None:
    save_sealed(tmp_path / "other", load_file(saved[1]), {"format": version})
    with pytest.raises(InputError, match=f"has format {version} and this version .* reads 3"):
        Inversion.load(tmp_path / "other", model)


def test_a_bit_that_has_changed_is_noticed(
    saved: tuple[Inversion, Path], model: SD3Model, tmp_path: Path
) -> None:
    """Wherever it is: in the header, in what is said, in the states, in the picture."""
    whole, file = saved[1].read_bytes(), tmp_path / "x"
    for place in random.Random(0).sample(range(len(whole)), 60):
        changed = bytearray(whole)
        changed[place] ^= 1 << place % 8
        file.write_bytes(changed)
        with pytest.raises(InputError, match="is not a saved inversion") as caught:
            Inversion.load(file, model)
        assert len(str(caught.value).splitlines()) == 1
    save_file(load_file(saved[1]), file, {"rectiflow": '{"format": 2}'})
    with pytest.raises(InputError, match="has no checksum: an earlier version wrote it"):
        Inversion.load(file, model)

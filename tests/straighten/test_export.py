"""What comes out runs in stock diffusers, where rectiflow cannot be imported, step for step."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rectiflow.errors import InputError, WorkError
from rectiflow.flow.solver import integrate
from rectiflow.models import FlowModel, Metadata, load
from rectiflow.models.guidance import GuidedVelocity
from rectiflow.models.schedulers import make_scheduler
from rectiflow.models.unet import UNetModel
from rectiflow.straighten import export, student
from rectiflow.straighten.export import save_pipeline
from rectiflow.straighten.monitor import conditional
from rectiflow.straighten.stock import stock_arguments, stock_scheduler
from rectiflow.straighten.training_record import read_record
from tests.straighten.stock import plainly_drawn, run_stock
from tests.tiny import tiny_model
from tests.tiny_flux import tiny_flux_model
from tests.tiny_qwen import tiny_qwen_model
from tests.tiny_sd import tiny_sd_model, tiny_sdxl_model

PROMPTS = ["a red apple", "two happy cats"]
STEPS = (1, 2, 4, 8, 25)
ODD = (3, 7, 30)
"""Numbers that do not divide 1000."""


def sd3() -> FlowModel:
    model = tiny_model(t5=True)
    model.metadata = Metadata(max_sequence_length=12, default_size=32)
    return model


def with_lora() -> FlowModel:
    model = student.begin(tiny_sd_model(rectified=True), lora=student.LoraPlan(2, 2.0))
    generator = torch.Generator().manual_seed(5)
    for weight in model.network.parameters():
        if weight.requires_grad:
            weight.data += 0.3 * torch.randn(weight.shape, generator=generator)
    model.network.eval()
    return model


MODELS = {
    "rectified": lambda: tiny_sd_model(rectified=True),
    "epsilon": tiny_sd_model,
    "v": lambda: tiny_sd_model("v_prediction", beta_schedule="linear", beta_end=0.01),
    "zero-snr": lambda: tiny_sd_model("v_prediction", zero_terminal_snr=True),
    "sample": lambda: tiny_sd_model("sample", beta_schedule="squaredcos_cap_v2"),
    "lora": with_lora,
    "told": lambda: tiny_sd_model(rectified=True, guidance_embedded=True),
    "sdxl": tiny_sdxl_model,
    "sdxl-rectified": lambda: tiny_sdxl_model(rectified=True),
    "sd3": sd3,
    "flux": lambda: tiny_flux_model(schnell=True),
    "flux-dynamic": lambda: tiny_flux_model(schnell=True, use_dynamic_shifting=True),
}
SHORT = {
    "rectified": (*STEPS, 3),
    "epsilon": (*STEPS, 7),
    "zero-snr": (1, 3),
    "lora": (1, 4),
    "told": (1, 2),
    "sdxl": (1, 4),
    "sd3": (1, 2, 4),
    "flux-dynamic": (1, 4),
}
LONG = {name: STEPS + ODD for name in MODELS}


class World(NamedTuple):
    folder: Path
    models: dict[str, FlowModel]
    noise: dict[str, Tensor]
    latents: dict[str, Tensor]
    rows: dict[str, list[int]]


def make_world(folder: Path, plan: dict[str, tuple[int, ...]]) -> World:
    """Export models, and let stock diffusers run each in those numbers of steps."""
    models = {name: MODELS[name]() for name in plan}
    noise, calls = {}, {}
    for name, model in models.items():
        save_pipeline(model, folder / name, dtype=torch.float32, student_steps=(1,))
        shape = model.latent_shape(32, 32)
        noise[name] = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
        calls[name] = {
            str(steps): {"prompt": PROMPTS} | stock_arguments(model, steps, 1.0)
            for steps in plan[name]
        }
    for name in ("rectified", "epsilon"):
        calls[name]["guided"] = {"prompt": PROMPTS} | stock_arguments(models[name], 4, 2.5)
    latents, rows = run_stock(folder, noise, calls)
    return World(folder, models, noise, latents, rows)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("exported"), SHORT)


def check_steps(world: World, name: str, counts: tuple[int, ...]) -> None:
    model, x_0 = world.models[name], world.noise[name]
    field = conditional(model, model.encode_prompt(PROMPTS))
    for steps in counts:
        ours = integrate(field, model.initial_state(x_0), model.student_grid(steps)).x
        stock = world.latents[f"{name}/{steps}"]
        assert torch.isfinite(stock).all() and float((stock - x_0).abs().max()) > 0.1
        scale = max(1.0, float(ours.abs().max()))
        assert float((stock - ours).abs().max()) < 4e-6 * scale, (name, steps)
        # Guidance 1: every step is one call on the rows given.
        assert world.rows[f"{name}/{steps}"] == [2] * steps


@pytest.mark.parametrize("name", SHORT)
def test_stock_steps_are_our_euler(name: str, world: World) -> None:
    """From the same noise, to the rounding of float32."""
    check_steps(world, name, SHORT[name])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_stock_steps_are_our_euler_everywhere(tmp_path: Path) -> None:
    world = make_world(tmp_path, LONG)
    for name, counts in LONG.items():
        check_steps(world, name, counts)


@pytest.mark.parametrize("name", ["rectified", "epsilon"])
def test_stock_guidance_is_ours(name: str, world: World) -> None:
    model, x_0 = world.models[name], world.noise[name]
    field = GuidedVelocity(model, model.encode_prompt(PROMPTS), guidance_scale=2.5)
    ours = integrate(field, model.initial_state(x_0), model.student_grid(4)).x
    assert world.rows[f"{name}/guided"] == [4] * 4
    scale = max(1.0, float(ours.abs().max()))
    assert float((world.latents[f"{name}/guided"] - ours).abs().max()) < 1e-5 * scale


@pytest.mark.parametrize("name", SHORT)
def test_it_loads_here_as_the_same_field(name: str, world: World) -> None:
    before, after = world.models[name], load(world.folder / name, device="cpu")
    assert after.prediction_type == before.prediction_type
    assert after.metadata.student_steps == (1,)
    x = world.noise[name]
    for t in (before.t_min, 0.4, 1.0):
        a = before.velocity(x, t, before.encode_prompt(PROMPTS))
        b = after.velocity(x, t, after.encode_prompt(PROMPTS))
        # Weights of a file lie otherwise in memory; a LoRA was beside them and is now within.
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    for steps in (1, 7):
        assert torch.equal(after.student_grid(steps), before.student_grid(steps))


def test_a_lora_stays_where_it_was(world: World) -> None:
    model = world.models["lora"]
    assert student.has_lora(model.network)
    keys = load(world.folder / "lora", device="cpu").network.state_dict()
    assert keys.keys() == world.models["rectified"].network.state_dict().keys()


@pytest.mark.parametrize("steps", range(1, 61))
def test_the_exact_field_needs_no_divisor_of_1000(steps: int) -> None:
    """DDIM by its name goes astray there; what is exported stops where the student does.

    (With 61 steps and some more numbers diffusers lists one timestep too many, -1.)
    """
    model = tiny_sd_model()
    scheduler = stock_scheduler(model)
    scheduler.set_timesteps(steps)
    path = model.diffusion_path
    assert path is not None
    assert torch.equal(path.grid(scheduler.timesteps.cpu()).float(), model.student_grid(steps))


def test_it_is_still_a_teacher_by_a_solver_of_higher_order(world: World) -> None:
    """The scheduler in the folder is of order 1; who asks for DPM-Solver++ (2M) gets it."""
    after = load(world.folder / "epsilon", device="cpu")
    assert after.pipeline.scheduler.config.solver_order == 1
    assert isinstance(after, UNetModel)
    assert make_scheduler(after, "dpmpp").config.solver_order == 2
    # Pictures of a few-step student are made by its own steps.
    assert after.default_solver == "euler" and world.models["epsilon"].default_solver == "dpmpp"


def test_half_precision_is_half_the_size(tmp_path: Path, world: World) -> None:
    model = world.models["rectified"]
    before = model.weight_hash
    save_pipeline(model, tmp_path / "half")
    del model.__dict__["weight_hash"]
    assert model.weight_hash == before and model.dtype == torch.float32
    sizes = [
        sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
        for folder in (tmp_path / "half", world.folder / "rectified")
    ]
    assert 0.5 <= sizes[0] / sizes[1] < 0.55  # headers of files do not shrink
    assert not [f for f in tmp_path.rglob("*") if f.suffix in (".bin", ".pt", ".pkl", ".ckpt")]
    half = load(tmp_path / "half", device="cpu").network.state_dict()
    for key, weight in model.network.state_dict().items():
        assert torch.equal(half[key], weight.half().float())


def test_whatever_the_files_are_in_a_folder_draws_as_it_is_loaded_plainly(tmp_path: Path) -> None:
    folders = {}
    every = MODELS | {"qwen": tiny_qwen_model}
    for dtype, names in {
        torch.float16: ("rectified", "epsilon", "sdxl-rectified", "sd3"),
        torch.bfloat16: ("rectified", "lora", "flux", "qwen"),
    }.items():
        for name in names:
            folder = tmp_path / f"{name}-{dtype}"
            save_pipeline(every[name](), folder, dtype=dtype)
            folders[folder.name] = str(folder)
            (header,) = {
                weight.dtype
                for file in folder.rglob("*.safetensors")
                for weight in load_file(file).values()
                if weight.is_floating_point()
            }
            assert header == dtype
    plainly_drawn(folders, tmp_path, height=32, width=32)


def test_nothing_else_is_overwritten(tmp_path: Path) -> None:
    model = tiny_sd_model(rectified=True)
    letter = tmp_path / "letters" / "letter.txt"
    letter.parent.mkdir()
    letter.write_text("dear")
    with pytest.raises(InputError, match=r"other things in it \(letter\.txt\)"):
        save_pipeline(model, letter.parent)
    with pytest.raises(InputError, match="is a file"):
        save_pipeline(model, letter)
    assert [path.name for path in letter.parent.iterdir()] == ["letter.txt"]
    # An earlier export is replaced, but not one to which something was added.
    out = tmp_path / "out"
    save_pipeline(model, out)
    save_pipeline(model, out, dtype=torch.float32)
    assert load(out, device="cpu").weight_hash == model.weight_hash
    (out / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"notes\.txt"):
        save_pipeline(model, out)
    assert {path.name for path in tmp_path.iterdir()} == {"letters", "out"}


def test_a_weight_that_does_not_fit_is_named(tmp_path: Path) -> None:
    model = tiny_sd_model(rectified=True)
    model.network.conv_in.bias.data[0] = 1e6
    with pytest.raises(InputError, match=r"unet\.conv_in\.bias .* float16 cannot hold: .*bfloat16"):
        save_pipeline(model, tmp_path / "out")
    save_pipeline(model, tmp_path / "out", dtype=torch.bfloat16)
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_a_full_disk_leaves_the_earlier_export(tmp_path: Path) -> None:
    """No file of more than 50 kB can be written here."""
    out = tmp_path / "out"
    first, second = tiny_sd_model(rectified=True), tiny_sd_model(rectified=True, seed=1)
    save_pipeline(first, out, dtype=torch.float32)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(WorkError, match="cannot write"):
            save_pipeline(second, out, dtype=torch.float32)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert load(out, device="cpu").weight_hash == first.weight_hash
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_what_is_read_must_be_what_was_written(tmp_path: Path) -> None:
    """The files of another seed's network are as good as any, but not the ones."""
    model = tiny_sd_model(rectified=True)
    save_pipeline(model, tmp_path / "a", dtype=torch.float32)
    other = tiny_sd_model(rectified=True, seed=1)
    with pytest.raises(WorkError, match="is not what was written"):
        export._check(tmp_path / "a", other.pipeline, torch.float32)


def test_the_record_goes_with_it_and_paths_do_not(tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    was = {"kind": "reflow", "steps": 5, "batch_size": 2}
    earlier = {"config": was, "base_model": "owner/name"}
    save_pipeline(tiny_sd_model(), teacher, record=earlier)
    model = load(teacher, device="cpu")
    config = {"kind": "distill", "steps": 10, "batch_size": 4, "student_steps": [1, 4]}
    given = {"config": config, "began_as": {"model": str(teacher), "weight_hash": "0" * 64}}
    out = tmp_path / "out"
    save_pipeline(model, out, record=given, student_steps=(4, 1))
    record = read_record(out)
    assert record is not None
    assert record["before"]["config"] == was and record["config"] == config
    assert record["base_model"] == "owner/name" and "diffusers" in record["versions"]
    metadata = load(out, device="cpu").metadata
    assert metadata.student_steps == (1, 4) and metadata.default_num_inference_steps == 1
    assert metadata.default_guidance_scale == 1.0
    assert load(teacher, device="cpu").metadata.default_guidance_scale == 1.0
    save_pipeline(tiny_sd_model(), tmp_path / "told", record=earlier, guidance_scale=2.5)
    assert load(tmp_path / "told", device="cpu").metadata.default_guidance_scale == 2.5
    assert "guidance_scale=2.5" in (tmp_path / "told" / "README.md").read_text()
    for file in out.rglob("*"):
        if file.suffix in (".json", ".md") and file.name != "training.json":
            assert str(tmp_path) not in file.read_text(), file
            json_text = file.read_text() if file.suffix == ".json" else "{}"
            assert "_name_or_path" not in json.loads(json_text)


def test_two_unets_in_series_are_for_us_alone(tmp_path: Path) -> None:
    model = student.begin(tiny_sd_model(rectified=True), stacked="separate")
    model.network.eval()
    save_pipeline(model, tmp_path / "out", dtype=torch.float32)
    assert "Not a stock diffusers model" in (tmp_path / "out" / "README.md").read_text()
    after = load(tmp_path / "out", device="cpu")
    x = torch.randn(1, *model.latent_shape(32, 32))
    cond = model.encode_prompt("a red apple")
    # Loaded weights lie in memory otherwise, so that kernels may sum in another order.
    expected = model.velocity(x, 0.3, cond)
    torch.testing.assert_close(after.velocity(x, 0.3, cond), expected, rtol=1e-4, atol=1e-5)

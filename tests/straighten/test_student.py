"""How students begin: the same field, the same output under another name, or a few weights."""

from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from rectiflow.errors import InputError
from rectiflow.flow.path import convert
from rectiflow.models import Conditioning, FlowModel
from rectiflow.models.generate import generate_latents
from rectiflow.models.guidance import GuidedVelocity
from rectiflow.straighten import student
from rectiflow.straighten.monitor import few_steps, told
from rectiflow.straighten.objective import (
    EndObjective,
    VelocityObjective,
    pack,
    prediction_scale,
    rows_by_step,
)
from tests.tiny import tiny_model
from tests.tiny_sd import tiny_sd_model, tiny_sdxl_model

PREDICTIONS = ("epsilon", "v_prediction", "sample")
MODELS = {
    **{prediction: lambda p=prediction: tiny_sd_model(p) for prediction in PREDICTIONS},
    "rectified": lambda: tiny_sd_model(rectified=True),
    "sdxl": tiny_sdxl_model,
    "sd3": tiny_model,
}


def inputs(model: FlowModel, count: int = 2) -> tuple[Tensor, Conditioning]:
    x = torch.randn(count, *model.latent_shape(32, 32), generator=torch.Generator().manual_seed(0))
    return x, model.encode_prompt(["a red apple", "two cats"][:count])


@pytest.mark.parametrize("name", MODELS)
def test_an_exact_start_is_the_teachers_field(name: str) -> None:
    """Bit for bit, in the parametrisation of the teacher, and with gradients."""
    teacher = MODELS[name]()
    before = teacher.weight_hash
    begun = student.begin(teacher, start="exact")
    x, cond = inputs(teacher)
    for t in (teacher.t_min, 0.3, torch.tensor([0.2, 0.9]), 1.0):
        assert torch.equal(begun.velocity(x, t, cond), teacher.velocity(x, t, cond))
    assert begun.prediction_type == teacher.prediction_type
    begun.differentiable_velocity(x, 0.5, cond).square().sum().backward()
    gradients = [p.grad for p in begun.network.parameters()]
    assert sum(g is not None and bool(g.any()) for g in gradients) > 0.7 * len(gradients)
    # The teacher is left as it was.
    assert all(p.grad is None and not p.requires_grad for p in teacher.network.parameters())
    assert begun.network is not teacher.network and not teacher.network.training
    assert begun.weight_hash == before


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_reused_weights_are_read_as_minus_the_velocity(prediction: str) -> None:
    """v = -output, at the timestep 1000 (1 - t), on the state as it is."""
    teacher = tiny_sd_model(prediction)
    begun = student.begin(teacher, start="reuse")
    assert begun.prediction_type == "velocity" and begun.t_min == 0 and begun.t_max == 1
    x, cond = inputs(teacher)
    for timestep in (999, 500, 1):
        with torch.no_grad():
            output = teacher.network(x, timestep, encoder_hidden_states=cond.embeds).sample
        t = 1 - (timestep + 0.5) / 1000  # told in whole numbers, rounded down
        assert torch.equal(begun.velocity(x, t, cond), -output)
    assert torch.equal(begun.initial_state(x), x)
    # The sign: what is near the noise is near noise - data, so its error is that of the data.
    x_0, x_1 = torch.randn(4000), torch.randn(4000)
    ours, instaflows = (-x_0 - (x_1 - x_0)).square().mean(), (x_0 - (x_1 - x_0)).square().mean()
    assert float(instaflows / ours) == pytest.approx(5, rel=0.1)


def test_only_what_has_the_sign_can_be_reused() -> None:
    with pytest.raises(InputError, match="start=exact"):
        student.begin(tiny_sd_model("sample"), start="reuse")
    rectified = tiny_sd_model(rectified=True)
    x, cond = inputs(rectified)
    begun = student.begin(rectified, start="reuse")
    assert torch.equal(begun.velocity(x, 0.4, cond), rectified.velocity(x, 0.4, cond))


@pytest.mark.parametrize("start", ["exact", "reuse"])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_few_steps_are_those_of_the_stock_pipeline(start: str, steps: int) -> None:
    """What a student is trained on is what diffusers does with it."""
    from diffusers import DDIMScheduler

    begun = student.begin(tiny_sd_model(), start=start)  # type: ignore[arg-type]
    x_0, cond = inputs(begun)
    pipeline: StableDiffusionPipeline = begun.pipeline
    if start == "exact":
        pipeline.scheduler = DDIMScheduler.from_config(
            pipeline.scheduler.config, timestep_spacing="trailing"
        )
    pipeline.set_progress_bar_config(disable=True)
    stock = pipeline(
        prompt_embeds=cond.embeds,
        latents=x_0.clone(),
        num_inference_steps=steps,
        guidance_scale=1.0,
        output_type="latent",
    ).images
    ours = few_steps(begun, cond, x_0, steps)
    torch.testing.assert_close(ours, stock, rtol=0, atol=2e-5 * float(stock.abs().max()))
    objective = EndObjective(begun, {steps: begun.student_grid(steps)})
    told = torch.full((2,), steps)
    with torch.no_grad():
        trained = objective.end(begun.initial_state(x_0), told, cond, rows_by_step(told))
    torch.testing.assert_close(trained, ours, rtol=0, atol=1e-5 * float(stock.abs().max()))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_loss_in_the_networks_own_prediction(prediction: str) -> None:
    """Against the prediction itself: the network's output and what it should have been."""
    begun = student.begin(tiny_sd_model(prediction))
    x, cond = inputs(begun)
    target = torch.randn_like(x)
    t = torch.tensor([0.3, 0.8])
    loss = VelocityObjective(begun, own_prediction=True)(x, t, target, **pack(cond))
    path = begun.diffusion_path
    assert path is not None
    for row, s in enumerate(t.double()):
        length = torch.hypot(s, 1 - s)
        a, b = s / length, (1 - s) / length
        x_t = x[[row]] * (a + b).float()
        output = begun.predict(x_t, path.timestep(s).float(), cond[[row]])  # type: ignore[attr-defined]
        wanted = convert(target[[row]], x_t, a, b, source="velocity", target=prediction)
        torch.testing.assert_close(
            loss[row].detach(), (output - wanted).square().mean().detach(), rtol=1e-3, atol=1e-6
        )
    assert torch.equal(prediction_scale(tiny_model(), t), torch.ones(2))


def test_a_student_that_is_told_the_guidance_scale() -> None:
    """It begins deaf, and learns to listen; stock pipelines tell it."""
    teacher = tiny_sd_model()
    begun = student.begin(teacher, guidance_embedded=True)
    assert begun.guidance_embeds
    x, cond = inputs(teacher)
    told_3 = told(begun, cond, torch.tensor([1.0, 3.0]))
    assert torch.equal(begun.velocity(x, 0.5, told_3), teacher.velocity(x, 0.5, cond))
    begun.differentiable_velocity(x, 0.5, told_3).square().sum().backward()
    weight = begun.network.time_embedding.cond_proj.weight
    assert weight.grad is not None and bool(weight.grad.any())
    with torch.no_grad():
        weight -= 0.1 * weight.grad.sign()
    one = GuidedVelocity(begun, cond, guidance_scale=1.0)(x, torch.tensor(0.5))
    three = GuidedVelocity(begun, cond, guidance_scale=3.0)(x, torch.tensor(0.5))
    assert not torch.equal(one, three)
    stock = begun.pipeline(
        prompt_embeds=cond.embeds,
        latents=x.clone(),
        num_inference_steps=3,
        guidance_scale=3.0,
        output_type="latent",
    ).images
    ours = generate_latents(
        begun,
        ["a red apple", "two cats"],
        x,
        num_inference_steps=3,
        guidance_scale=3.0,
        solver="ddim",
    ).x
    torch.testing.assert_close(ours, stock, rtol=1e-3, atol=1e-3)
    with pytest.raises(InputError, match="U-Net"):
        student.begin(tiny_model(), guidance_embedded=True)


@pytest.mark.parametrize("name", ["epsilon", "sd3"])
def test_a_lora_student_trains_a_lora_alone(name: str) -> None:
    teacher = MODELS[name]()
    plan = student.LoraPlan(rank=2, alpha=4.0)
    begun = student.begin(teacher, lora=plan)
    x, cond = inputs(teacher)
    assert torch.equal(begun.velocity(x, 0.5, cond), teacher.velocity(x, 0.5, cond))
    trained = {n: p for n, p in begun.network.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in n for n in trained)
    first = {n: p.clone() for n, p in begun.network.named_parameters()}
    again = student.begin(teacher, lora=plan)
    assert all(torch.equal(first[n], p) for n, p in again.network.named_parameters())
    torch.manual_seed(0)
    with torch.no_grad():
        for p in trained.values():
            p += 0.1 * torch.randn_like(p)
    changed = begun.velocity(x, 0.5, cond)
    assert not torch.equal(changed, teacher.velocity(x, 0.5, cond))
    whole = student.merged(begun)
    assert not any("lora" in n for n, _ in whole.network.named_parameters())
    torch.testing.assert_close(whole.velocity(x, 0.5, cond), changed, rtol=1e-4, atol=1e-5)
    assert student.has_lora(begun.network)  # that one goes on training
    with pytest.raises(InputError, match="nowhere"):
        student.begin(teacher, lora=student.LoraPlan(2, 2.0, ("nowhere",)))


def test_a_lora_without_peft_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = tiny_sd_model()
    with monkeypatch.context() as old, pytest.raises(InputError, match="a LoRA student needs peft"):
        old.setattr("diffusers.utils.constants.MIN_PEFT_VERSION", "99.1.0")
        student.begin(teacher, lora=student.LoraPlan(2, 2.0))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install"):
        student.begin(teacher, lora=student.LoraPlan(2, 2.0))


@pytest.mark.parametrize("stacked", ["shared", "separate"])
def test_two_unets_in_series(stacked: str) -> None:
    """Each begins with the teacher's weights; in full, the second sees what the first gives."""
    teacher = tiny_sd_model()
    begun = student.begin(teacher, start="reuse", stacked=stacked)  # type: ignore[arg-type]
    x, cond = inputs(teacher)
    begun.differentiable_velocity(x, 0.5, cond).square().sum().backward()
    moved = [p.grad is not None and bool(p.grad.any()) for p in begun.network.parameters()]
    assert sum(moved) > 0.7 * len(moved)
    whole = student.begin(teacher, start="reuse", stacked=stacked, keep_middle=True)  # type: ignore[arg-type]
    with torch.no_grad():
        between = teacher.network(x, 500, encoder_hidden_states=cond.embeds).sample
        wanted = teacher.network(between, 500, encoder_hidden_states=cond.embeds).sample
    assert torch.equal(whole.velocity(x, 0.5, cond), -wanted)
    sizes = [sum(p.numel() for p in m.network.parameters()) for m in (teacher, whole)]
    assert sizes[1] == sizes[0] * (1 if stacked == "shared" else 2)
    with pytest.raises(InputError, match="U-Net"):
        student.begin(tiny_model(), stacked=stacked)  # type: ignore[arg-type]


def test_a_student_shares_what_is_not_trained() -> None:
    teacher = tiny_sd_model()
    begun = student.begin(teacher)
    for name in ("vae", "text_encoder", "tokenizer"):
        assert begun.pipeline.components[name] is teacher.pipeline.components[name]
    assert next(student.begin(tiny_sd_model(dtype=torch.bfloat16)).network.parameters()).dtype == (
        torch.float32
    )

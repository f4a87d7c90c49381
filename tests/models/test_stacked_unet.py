"""Two U-Nets in series: parameters, gradients, the composition written out, files, the field."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from rectiflow.errors import InputError
from rectiflow.models import SDModel, SDXLModel, generate, load
from rectiflow.models.stacked_unet import StackedUNet
from tests.tiny import WIDTH
from tests.tiny_sd import tiny_sd, tiny_sdxl, tiny_unet

KINDS = [(share, remove) for share in (False, True) for remove in (False, True)]
each_kind = pytest.mark.parametrize(("share", "remove"), KINDS)
two_kinds = pytest.mark.parametrize(("share", "remove"), [(False, False), (True, True)])


def make(share: bool, remove: bool, **config: Any) -> StackedUNet:
    """Two U-Nets, which are not the same unless they share their weights."""
    stacked = StackedUNet.from_unet(tiny_unet(**config).eval(), share, remove)
    with torch.no_grad():
        for weight in stacked.unets[-1].parameters():
            weight.add_(0.02 * torch.randn_like(weight))
    return stacked


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, 4, 8, 8), torch.tensor([999.0, 12.5]), torch.randn(2, 7, WIDTH)


def count(module: torch.nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def composed(stacked: StackedUNet, x: Tensor, t: Tensor, text: Tensor, remove: bool) -> Tensor:
    """The network block by block, from the U-Nets' parts; no forward of a whole U-Net."""
    first, second = stacked.unets[0], stacked.unets[-1]
    h = trunk(first, first.conv_in(x), t, text)
    if not remove:
        h = second.conv_in(tail(first, h))
    return tail(second, trunk(second, h, t, text))


def trunk(unet: UNet2DConditionModel, h: Tensor, t: Tensor, text: Tensor) -> Tensor:
    emb = unet.time_embedding(unet.time_proj(t))
    skips = [h]
    for down in unet.down_blocks:
        looked_up = {"encoder_hidden_states": text} if hasattr(down, "attentions") else {}
        h, more = down(h, emb, **looked_up)
        skips += more
    h = unet.mid_block(h, emb, encoder_hidden_states=text)
    for up in unet.up_blocks:
        looked_up = {"encoder_hidden_states": text} if hasattr(up, "attentions") else {}
        mine = tuple(skips.pop() for _ in up.resnets)[::-1]
        h = up(h, mine, emb, **looked_up)
    assert not skips
    return h


def tail(unet: UNet2DConditionModel, h: Tensor) -> Tensor:
    return unet.conv_out(torch.nn.functional.silu(unet.conv_norm_out(h)))


@each_kind
def test_parameters(share: bool, remove: bool) -> None:
    unet = tiny_unet()
    middle = count(unet.conv_in) + count(unet.conv_norm_out) + count(unet.conv_out)
    expected = count(unet) * (1 if share else 2) - (middle if remove and not share else 0)
    stacked = StackedUNet.from_unet(unet, share, remove)
    assert count(stacked) == expected
    # And none of them is idle.
    stacked(*inputs()).sample.square().sum().backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in stacked.parameters())


@each_kind
def test_the_composition(share: bool, remove: bool) -> None:
    stacked, given = make(share, remove), inputs()
    with torch.no_grad():
        (ours,) = stacked(*given, return_dict=False)
        assert torch.allclose(ours, composed(stacked, *given, remove), atol=1e-6)
        assert ours.std() > 1e-2


def test_without_removal_it_is_one_after_the_other() -> None:
    stacked, (x, t, text) = make(False, False), inputs()
    first, second = stacked.unets
    with torch.no_grad():
        theirs = second(first(x, t, text).sample, t, text).sample
        assert torch.equal(stacked(x, t, text).sample, theirs)


def test_it_begins_as_the_same_u_net_twice() -> None:
    unet, (x, t, text) = tiny_unet().eval(), inputs()
    before = {name: weight.clone() for name, weight in unet.state_dict().items()}
    with torch.no_grad():
        twice = unet(unet(x, t, text).sample, t, text).sample
        for share in (False, True):
            stacked = StackedUNet.from_unet(unet, share, remove_middle=False)
            assert torch.equal(stacked(x, t, text).sample, twice)
            for weight in stacked.parameters():
                weight.zero_()
    assert all(torch.equal(weight, before[name]) for name, weight in unet.state_dict().items())


@pytest.mark.parametrize("remove", [False, True])
def test_shared_weights_receive_the_sum_of_both_gradients(remove: bool) -> None:
    unet, given = tiny_unet(), inputs()
    grads = []
    for share in (True, False):
        stacked = StackedUNet.from_unet(unet, share, remove)
        stacked(*given).sample.square().sum().backward()
        grads.append({name: weight.grad for name, weight in stacked.named_parameters()})
    shared, apart = grads
    both = 0
    for name, grad in shared.items():
        parts = [apart.get(name), apart.get(name.replace("unets.0", "unets.1"))]
        parts = [part for part in parts if part is not None]
        assert torch.allclose(grad, sum(parts), rtol=1e-4, atol=1e-5 * grad.abs().max()), name
        both += len(parts) == 2
    assert both >= len(shared) - 6


@two_kinds
def test_gradient_checkpointing_changes_nothing(share: bool, remove: bool) -> None:
    stacked, given = make(share, remove).train(), inputs()
    grads = []
    for checkpointed in (False, True):
        if checkpointed:
            stacked.enable_gradient_checkpointing()
        assert stacked.is_gradient_checkpointing == checkpointed
        stacked.zero_grad()
        stacked(*given).sample.square().sum().backward()
        grads.append([weight.grad for weight in stacked.parameters()])
    for plain, recomputed in zip(*grads, strict=True):
        assert torch.allclose(plain, recomputed, rtol=1e-4, atol=1e-5 * plain.abs().max())


@each_kind
def test_files_give_back_every_bit(share: bool, remove: bool, tmp_path: Path) -> None:
    stacked, given = make(share, remove), inputs()
    stacked.save_pretrained(tmp_path)
    files = list(tmp_path.glob("*.safetensors"))
    assert len(files) == 1 and files[0].stat().st_size < count(stacked) * 4 * 1.1
    again, info = StackedUNet.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert (again.config.share, again.config.remove_middle) == (share, remove)
    assert again.config.in_channels == 4 and again.config.sample_size == 8
    weights = again.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in stacked.state_dict().items())
    with torch.no_grad():  # weights of a file lie otherwise in memory: not to the bit
        torch.testing.assert_close(again(*given).sample, stacked(*given).sample, atol=1e-5, rtol=0)


def test_dtype_and_training_are_kept() -> None:
    unet = tiny_unet().to(torch.bfloat16).eval()
    for share, remove in KINDS:
        stacked = StackedUNet.from_unet(unet, share, remove)
        assert stacked.dtype == torch.bfloat16 and not stacked.training
        assert stacked.to(torch.float64).dtype == torch.float64
        x, t, text = inputs()
        assert stacked(x.double(), t, text.double()).sample.dtype == torch.float64


@two_kinds
def test_both_are_told_the_guidance_scale(share: bool, remove: bool) -> None:
    stacked, (x, t, text) = make(share, remove, time_cond_proj_dim=6), inputs()
    told = torch.randn(2, 6)
    with torch.no_grad():
        for part in stacked.unets:
            part.time_embedding.cond_proj.weight.mul_(20)
        ours = stacked(x, t, text, timestep_cond=told).sample
        if not remove:
            between = stacked.unets[0](x, t, text, timestep_cond=told).sample
            theirs = stacked.unets[-1](between, t, text, timestep_cond=told).sample
            assert torch.equal(ours, theirs)
        assert (ours - stacked(x, t, text, timestep_cond=-told).sample).abs().max() > 1e-3


@each_kind
def test_weights_may_wait_elsewhere(share: bool, remove: bool) -> None:
    """As under offloading, where hooks are put around every module's forward."""
    stacked, given = make(share, remove), inputs()
    with torch.no_grad():
        before = stacked(*given).sample
        cpu_offload(stacked, execution_device=torch.device("cpu"))
        for part in stacked.unets:
            add_hook_to_module(part, ModelHook(), append=True)
        assert all(weight.is_meta for weight in stacked.parameters())
        assert torch.equal(stacked(*given).sample, before)


def test_a_lora_goes_into_both_and_merges() -> None:
    stacked, given = make(False, True), inputs()
    settings = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    with torch.no_grad():
        plain = stacked(*given).sample
        stacked.add_adapter(settings)
        changed = stacked(*given).sample
        assert (changed - plain).abs().max() > 1e-3
        stacked.fuse_lora()
        stacked.unload_lora()
        assert torch.allclose(stacked(*given).sample, changed, atol=1e-5)
    assert stacked.state_dict().keys() == make(False, True).state_dict().keys()


def stacked_pipeline(share: bool, remove: bool, rectified: bool) -> StableDiffusionPipeline:
    parts = tiny_sd(rectified=rectified).components
    parts["unet"] = make(share, remove)
    return StableDiffusionPipeline(**parts, requires_safety_checker=False)


@each_kind
def test_the_velocity_of_a_model(share: bool, remove: bool) -> None:
    model = SDModel(stacked_pipeline(share, remove, rectified=True), name="stacked")
    cond, (x, _, _) = model.encode_prompt(["a red apple", "two dogs"]), inputs()
    with torch.no_grad():
        u = composed(model.network, x, torch.full((2,), 750.0), cond.embeds, remove)
    assert torch.allclose(model.velocity(x, 0.25, cond), -u, atol=1e-6)
    assert (model.channels, model.default_size, model.guidance_embeds) == (4, 32, False)
    given = cond.embeds.requires_grad_(True)
    model.differentiable_velocity(x, 0.25, type(cond)(given)).sum().backward()
    assert given.grad is not None


def test_a_pipeline_with_it_loads_where_nothing_else_is_imported(tmp_path: Path) -> None:
    """diffusers takes a part it does not know only from a module that is already there."""
    pipeline = stacked_pipeline(False, True, rectified=True)
    pipeline.save_pretrained(tmp_path)
    program = (
        "import rectiflow as rf; m = rf.load('.', device='cpu'); "
        "rf.generate(m, 'a dog', num_inference_steps=1)[0].save('image.png'); print(m.weight_hash)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    model = SDModel(pipeline)
    assert done.stdout.split()[-1] == model.weight_hash
    (image,) = generate(model, "a dog", num_inference_steps=1)
    assert Image.open(tmp_path / "image.png").tobytes() == image.tobytes()


@two_kinds
def test_a_loaded_model_is_the_same_field(share: bool, remove: bool, tmp_path: Path) -> None:
    pipeline, (x, _, _) = stacked_pipeline(share, remove, rectified=False), inputs()
    pipeline.save_pretrained(tmp_path)
    before, after = SDModel(pipeline), load(tmp_path, device="cpu")
    assert isinstance(after.network, StackedUNet)
    cond = before.encode_prompt(["a red apple", "two dogs"])
    # Weights elsewhere in memory may go through other kernels.
    found, expected = (one.velocity(x, 0.3, cond) for one in (after, before))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_missing_weights_are_one_line(tmp_path: Path) -> None:
    stacked_pipeline(True, True, rectified=True).save_pretrained(tmp_path)
    file = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    del weights["unets.0.conv_out.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"conv_out.weight is missing"):
        load(tmp_path)


def test_two_of_sdxl() -> None:
    parts = tiny_sdxl(rectified=True).components
    parts["unet"] = StackedUNet.from_unet(parts["unet"])
    plain = SDXLModel(tiny_sdxl(rectified=True))
    model = SDXLModel(type(plain.pipeline)(**parts, add_watermarker=False))
    cond, (x, _, _) = model.encode_prompt(["a red apple", "two dogs"]), inputs()
    velocity = model.velocity(x, 0.5, cond)
    assert velocity.shape == x.shape
    assert (velocity - plain.velocity(x, 0.5, cond)).abs().max() > 1e-2
    # Sizes and the pooled feature arrive.
    cond.pooled.mul_(-1)
    assert (velocity - model.velocity(x, 0.5, cond)).abs().max() > 1e-4


def test_what_cannot_be_stacked() -> None:
    stacked = make(False, True)
    with pytest.raises(InputError, match="a StackedUNet cannot be stacked"):
        StackedUNet.from_unet(stacked)
    unet = tiny_unet()
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(InputError, match="merge the LoRA first"):
        StackedUNet.from_unet(unet)

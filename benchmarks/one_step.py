"""What a picture by a one-step model costs beside its bare modules, measured in one run.

    python benchmarks/one_step.py [--model emoji-instaflow | --shape sd1.5] [--repeats 100] [--json]
    python benchmarks/one_step.py --shape sd1.5 --device cuda --dtype float16 [--compile MODE]

Three take turns in one process on the same modules, so that a noisy machine troubles them alike:
the bare modules (tokenizer, text encoder, U-Net once at batch 1 without guidance, decoder, one
after the other in `torch.inference_mode`), `rectiflow.generate(model, prompt)`, and the stock
`StableDiffusionPipeline`. Tokenising counts on every side, since no text encoder runs without it;
`ratio_without_tokenizer` takes it from the bare side alone. Noise, grid, solver, checks and the
picture itself (PIL) count on the sides of the library and the pipeline only. Ratios are those of
the medians; beside the wall's clock that of the processor is read, which other programs trouble
less. Time does not depend on the weights: `--shape` has random ones.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import rectiflow

ROOT = Path(__file__).parents[1]
LIMIT = 1.10
PROMPT = "two red apples on a blue background"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SIDES = ("bare", "library", "stock")


def main() -> None:
    """Measure, print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="emoji-instaflow", help="a name or a folder")
    parser.add_argument("--shape", choices=("sd1.5",), help="random weights, in place of a model")
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32")
    parser.add_argument(
        "--compile",
        nargs="?",
        const="default",
        choices=("default", "reduce-overhead", "max-autotune"),
        help="compile the modules, for all sides",
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    model = model_of(options)
    if options.compile:
        for module in (model.pipeline.text_encoder, model.network, model.pipeline.vae.decoder):
            module.compile(mode=options.compile)
    record: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": machine(torch.device(options.device)),
        "torch": torch.__version__,
        **vars(options),
        **measure(model, options.repeats),
        "limit": LIMIT,
    }
    record.pop("json")
    record["model" if options.shape else "shape"] = None
    if options.json:
        print(json.dumps(record, indent=2))
        return
    print(f"{record['machine']}, {options.threads} thread(s), {record['date']}")
    for name in (*SIDES, *record["parts_ms"]):
        found = record.get(name) or {"median_ms": record["parts_ms"][name]}
        print(f"{name:14}" + "".join(f"  {key} {value:8.2f}" for key, value in found.items()))
    print(
        f"library {record['ratio']:.3f} × the bare modules (limit {LIMIT:.2f}; processor time "
        f"{record['ratio_cpu']:.3f}, fastest {record['ratio_fastest']:.3f}, tokenizer not counted "
        f"as bare {record['ratio_without_tokenizer']:.3f}), stock {record['stock_ratio']:.3f} ×"
    )


def measure(model: Any, repeats: int) -> dict[str, Any]:
    """Milliseconds of a picture on the three sides, of the modules, and the ratios."""
    parts = bare_parts(model)
    work: dict[str, Callable[[], Any]] = {
        "bare": lambda: chain(parts),
        "library": lambda: rectiflow.generate(model, PROMPT)[0],
        "stock": lambda: stock(model),
    }
    record: dict[str, Any] = {
        "network_calls": {name: calls(model.network, work[name]) for name in SIDES},
        "parameters": sum(p.numel() for part in model.modules.values() for p in part.parameters()),
        "size": model.default_size,
        "difference_of_pictures": difference(work["library"](), work["stock"]()),
    }
    for _ in range(2):  # once more, now that nothing watches
        for name in SIDES:
            work[name]()
    wall, cpu = take_turns(work, repeats, model.device)
    for name in SIDES:
        record[name] = {
            "median_ms": statistics.median(wall[name]),
            "fastest_ms": min(wall[name]),
            "cpu_ms": statistics.median(cpu[name]),
        }
    inputs = inputs_of(parts)
    modules = {
        name: lambda part=part, given=given: part(given)
        for (name, part), given in zip(parts.items(), inputs, strict=True)
    }
    with torch.inference_mode():
        each, _ = take_turns(modules, repeats, model.device)
    record["parts_ms"] = {name: statistics.median(times) for name, times in each.items()}
    bare, library = record["bare"], record["library"]
    without = bare["median_ms"] - record["parts_ms"]["tokenizer"]
    return record | {
        "ratio": library["median_ms"] / bare["median_ms"],
        "ratio_fastest": library["fastest_ms"] / bare["fastest_ms"],
        "ratio_cpu": library["cpu_ms"] / bare["cpu_ms"],
        "ratio_without_tokenizer": library["median_ms"] / without,
        "stock_ratio": record["stock"]["median_ms"] / bare["median_ms"],
        "stock_ratio_cpu": record["stock"]["cpu_ms"] / bare["cpu_ms"],
    }


def bare_parts(model: Any) -> dict[str, Callable[[Any], Any]]:
    """The modules as nobody could call them with less, each on what the last one gave."""
    pipeline, device = model.pipeline, model.device
    side = model.default_size
    noise = torch.randn(1, *model.latent_shape(side, side)).to(device, model.dtype)
    timestep = torch.tensor(999, device=device)

    def tokenize(prompt: str) -> Tensor:
        length = pipeline.tokenizer.model_max_length
        tokens = pipeline.tokenizer(
            prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        return tokens.input_ids.to(device)

    codec = next(pipeline.vae.parameters()).dtype
    return {
        "tokenizer": tokenize,
        "text_encoder": lambda ids: pipeline.text_encoder(ids)[0],
        "unet": lambda embeds: model.network(noise, timestep, embeds, return_dict=False)[0],
        "decoder": lambda latent: pipeline.vae.decode(latent.to(codec), return_dict=False)[0],
    }


@torch.inference_mode()
def chain(parts: dict[str, Callable[[Any], Any]]) -> Any:
    """One part after the other."""
    given: Any = PROMPT
    for part in parts.values():
        given = part(given)
    return given


@torch.inference_mode()
def inputs_of(parts: dict[str, Callable[[Any], Any]]) -> list[Any]:
    """What each part is given."""
    inputs: list[Any] = [PROMPT]
    for part in list(parts.values())[:-1]:
        given = part(inputs[-1])
        inputs.append(given.clone() if isinstance(given, Tensor) else given)
    return inputs


def stock(model: Any) -> Any:
    """The stock pipeline: the same noise, one step, no guidance."""
    return model.pipeline(
        PROMPT,
        num_inference_steps=1,
        guidance_scale=1.0,
        height=model.default_size,
        width=model.default_size,
        generator=torch.Generator().manual_seed(0),
    ).images[0]


def take_turns(
    work: dict[str, Callable[[], Any]], repeats: int, device: torch.device
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Milliseconds by the wall's clock and of this process; who begins changes with each turn."""
    wall: dict[str, list[float]] = {name: [] for name in work}
    cpu: dict[str, list[float]] = {name: [] for name in work}
    names = list(work)
    for turn in range(repeats):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            wait(device)
            began, began_cpu = time.perf_counter(), time.process_time()
            work[name]()
            wait(device)
            wall[name].append(1000 * (time.perf_counter() - began))
            cpu[name].append(1000 * (time.process_time() - began_cpu))
    return wall, cpu


def wait(device: torch.device) -> None:
    """Until the accelerator has done what it was told."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def calls(network: Any, function: Callable[[], Any]) -> int:
    """How often the network is called."""
    seen = []
    hook = network.register_forward_pre_hook(lambda *_: seen.append(1))
    try:
        function()
    finally:
        hook.remove()
    return len(seen)


def difference(one: Any, other: Any) -> int:
    """The largest, of 8-bit values: that both sides drew the same picture."""
    import numpy as np

    return int(np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).max())


def model_of(options: argparse.Namespace) -> Any:
    """The model on its device, the stock pipeline without its progress bar."""
    dtype, device = DTYPES[options.dtype], torch.device(options.device)
    if options.shape:
        model = random_sd15(dtype, device)
    else:
        model = rectiflow.load(options.model, dtype=dtype, device=device)
    model.pipeline.set_progress_bar_config(disable=True)
    if dtype != torch.float32:  # the stock pipeline cannot have its codec in another
        model.pipeline.vae.to(dtype)
    steps, scale = model.default_num_inference_steps, model.default_guidance_scale
    if (steps, scale) != (1, 1):
        sys.exit(
            f"{model.name} is used with {steps} steps and guidance {scale}: give a one-step model"
        )
    return model


def random_sd15(dtype: torch.dtype, device: torch.device) -> Any:
    """Stable Diffusion 1.5's modules, 512 pixels, as a one-step student: random weights."""
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    sys.path.insert(0, str(ROOT))
    from rectiflow.models import Metadata, SDModel
    from rectiflow.models.schedulers import rectified_scheduler
    from tests.tiny import clip_tokenizer

    widths = (128, 256, 512, 512)
    torch.manual_seed(0)
    parts = {
        "unet": UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
        "vae": AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * len(widths),
            up_block_types=("UpDecoderBlock2D",) * len(widths),
            block_out_channels=widths,
            layers_per_block=2,
            latent_channels=4,
            sample_size=512,
        ),
        "text_encoder": CLIPTextModel(
            CLIPTextConfig(
                hidden_size=768,
                intermediate_size=3072,
                num_hidden_layers=12,
                num_attention_heads=12,
                max_position_embeddings=77,
            )
        ),
    }
    tokenizer = clip_tokenizer()
    tokenizer.model_max_length = 77
    pipeline = StableDiffusionPipeline(
        **{name: part.eval().requires_grad_(False) for name, part in parts.items()},
        tokenizer=tokenizer,
        scheduler=rectified_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    use = Metadata(default_guidance_scale=1.0, default_num_inference_steps=1, student_steps=(1,))
    return SDModel(pipeline.to(device, dtype), name="sd1.5", metadata=use)


def machine(device: torch.device) -> str:
    """What it was measured on."""
    cpu = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    return cpu if device.type == "cpu" else f"{torch.cuda.get_device_name(device)}, {cpu}"


if __name__ == "__main__":
    main()

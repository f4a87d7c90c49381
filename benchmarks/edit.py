"""What an edit costs beside its network: time and peak memory, as ratios measured in one run.

    python benchmarks/edit.py [--preset fast exact] [--repeats 5] [--json]

The bare network is called as often as the edit calls it, on the same shapes, in turns with whole
edits (codec, text encoders, alignment, controls and all), so that a noisy machine troubles both
alike; the ratio is that of the medians. Peak memory is that of a process of its own beside one
that only runs the bare network (read from Linux's /proc).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SOURCE, TARGET = "two red apples on a blue background", "two red apples on a green background"
SHAPES = ("emoji", "sd3.5-8x512")
LIMITS = {"emoji": 1.10, "sd3.5-8x512": 1.05}


def main() -> None:
    """Measure, print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", nargs="+", default=["fast", "exact"])
    parser.add_argument("--shape", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--alone", metavar="WHAT", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        print(alone(options.shape[0], options.alone, options.threads))
        return
    rows = [
        measure(shape, preset, options.repeats, options.threads)
        for shape in options.shape
        for preset in options.preset
    ]
    record = {
        "date": date.today().isoformat(),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "threads": options.threads,
        "repeats": options.repeats,
        "rows": rows,
    }
    if options.json:
        print(json.dumps(record, indent=2))
        return
    print(f"{record['machine']}, {options.threads} thread(s), {record['date']}")
    for row in rows:
        print(
            f"{row['shape']:12} {row['preset']:8} {row['nfe']:4d} samples, network "
            f"{row['network_s']:.2f} s, edit {row['edit_s']:.2f} s: {row['overhead']:.3f} × "
            f"(limit {row['limit']:.2f}); a second target {row['second_nfe']} samples; peak "
            f"memory {row['edit_mib']:.0f} MiB beside {row['network_mib']:.0f} MiB"
        )


def model_of(shape: str) -> Any:
    """The embedded model, or one of SD3.5's classes at a shape between toy and truth."""
    from rectiflow.models import SD3Model, load

    if shape == "emoji":
        return load("emoji-sd3")
    import torch
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    sys.path.insert(0, str(ROOT))
    from rectiflow.models import Metadata
    from tests.tiny import WIDTH, tiny_sd3

    parts = tiny_sd3().components
    torch.manual_seed(0)
    parts["transformer"] = SD3Transformer2DModel(
        sample_size=32,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=8,
        attention_head_dim=64,
        num_attention_heads=8,
        joint_attention_dim=WIDTH,
        caption_projection_dim=512,
        pooled_projection_dim=WIDTH,
        pos_embed_max_size=32,
        dual_attention_layers=(0, 1, 2, 3),
        qk_norm="rms_norm",
    ).eval()
    pipeline = StableDiffusion3Pipeline(**parts)
    return SD3Model(pipeline, name=shape, metadata=Metadata(max_sequence_length=77))


def picture(model: Any) -> Any:
    """A picture of the model's size."""
    import numpy as np
    from PIL import Image

    side = model.default_size
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)


def work(model: Any, preset: str) -> tuple[Callable[[], Any], Callable[[int], None]]:
    """(A whole edit; so many bare calls of the network on an edit's shapes)."""
    import torch

    import rectiflow

    image = picture(model)
    side = model.default_size
    x = torch.randn(1, *model.latent_shape(side, side))
    cond = model.encode_prompt(SOURCE)

    def edit() -> Any:
        return rectiflow.edit(
            model,
            image,
            source_prompt=SOURCE,
            prompts=TARGET,
            preset=preset,
            num_inference_steps=30,
        )

    @torch.no_grad()
    def bare(calls: int) -> None:
        time_input = torch.full((1,), 500.0)
        for _ in range(calls):
            model.network(
                hidden_states=x.to(model.dtype),
                timestep=time_input,
                encoder_hidden_states=cond.embeds.to(model.dtype),
                pooled_projections=cond.pooled.to(model.dtype),
                return_dict=False,
            )

    return edit, bare


def measure(shape: str, preset: str, repeats: int, threads: int) -> dict[str, Any]:
    """One row: an edit beside its network."""
    import torch

    import rectiflow

    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    model = model_of(shape)
    edit, bare = work(model, preset)
    result = edit()
    nfe = result.nfe["total"]
    second = rectiflow.edit(model, result.inversion, prompts=TARGET, preset=preset)
    bare(5)
    edits, networks = [], []
    for _ in range(repeats):
        for function, times in ((lambda: bare(nfe), networks), (edit, edits)):
            started = time.perf_counter()
            function()
            times.append(time.perf_counter() - started)
    network_s, edit_s = statistics.median(networks), statistics.median(edits)
    return {
        "shape": shape,
        "preset": preset,
        "nfe": nfe,
        "second_nfe": second.nfe["editing"],
        "network_s": network_s,
        "edit_s": edit_s,
        "overhead": edit_s / network_s,
        "limit": LIMITS[shape],
        "edit_mib": peak(shape, preset, threads),
        "network_mib": peak(shape, "network", threads),
    }


def peak(shape: str, what: str, threads: int) -> float:
    """Peak memory, MiB, of a process that does one thing."""
    command = [sys.executable, __file__, "--shape", shape, "--alone", what]
    command += ["--threads", str(threads)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def alone(shape: str, what: str, threads: int) -> float:
    """In that process: do it, and say how much memory it took at most."""
    import torch

    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    model = model_of(shape)
    edit, bare = work(model, "fast" if what == "network" else what)
    if what == "network":
        bare(2)
    else:
        edit()
    # getrusage would count what this process's parent held when it was forked.
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    main()

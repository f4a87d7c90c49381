"""What making pairs costs beside the bare network, and their bytes, measured in one run.

    python benchmarks/pairs.py [--model emoji-sd] [--num 64] [--repeats 5] [--json]

The bare network is called as often as the pairs call it, on the same shapes, in turns with whole
stores made from nothing (prompts, noise, scheduler, shards, checksums and all), so that a noisy
machine troubles both alike; the ratio is that of the medians. Bytes are those of a whole store,
of this model and of one with Stable Diffusion 1.5's latents, beside the float16 latents alone.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TIME_LIMIT, BYTES_LIMIT = 1.05, 1.02
GUIDANCE, STEPS = 5.0, 25


def main() -> None:
    """Measure, print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="emoji-sd")
    parser.add_argument("--num", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")

    import torch

    import rectiflow

    torch.set_num_threads(options.threads)
    model = rectiflow.load(options.model)
    record = {
        "date": date.today().isoformat(),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        **vars(options),
        **pace(model, options.num, options.batch_size, options.repeats),
        "bytes_per_pair": {
            options.model: weight(model, 1024),
            "SD1.5's latents": weight(wide_latents(), 256),
        },
    }
    if options.json:
        print(json.dumps(record, indent=2))
        return
    print(f"{record['machine']}, {options.threads} thread(s), {record['date']}")
    print(
        f"{options.num} pairs, {record['calls']} network calls: network {record['network_s']:.2f} "
        f"s, pairs {record['pairs_s']:.2f} s: {record['overhead']:.3f} × (limit {TIME_LIMIT})"
    )
    for name, ratio in record["bytes_per_pair"].items():
        print(f"{name}: {ratio:.4f} × the bytes of the float16 latents (limit {BYTES_LIMIT})")


def pace(model: Any, num: int, batch_size: int, repeats: int) -> dict[str, Any]:
    """Seconds of making pairs, and of the network alone."""
    import torch

    from rectiflow.emoji.caption import caption
    from rectiflow.emoji.scene import sample
    from rectiflow.straighten.pair_maker import make_pairs

    prompts = [caption(sample(seed)) for seed in range(num)]
    side = model.default_size
    calls = STEPS * -(-num // batch_size)
    x = torch.randn(2 * batch_size, *model.latent_shape(side, side))
    embeds = model.encode_prompt(prompts[0]).rows(2 * batch_size).embeds.to(model.dtype)

    def make() -> None:
        with tempfile.TemporaryDirectory() as folder:
            make_pairs(
                model,
                prompts,
                Path(folder) / "pairs",
                guidance_scale=GUIDANCE,
                num_inference_steps=STEPS,
                batch_size=batch_size,
            )

    @torch.no_grad()
    def bare() -> None:
        for _ in range(calls):
            model.network(x.to(model.dtype), 500, embeds, return_dict=False)

    _ = model.weight_hash  # read once per process, whatever is made
    make()
    pairs_s, network_s = alternate(make, bare, repeats)
    return {
        "calls": calls,
        "network_s": network_s,
        "pairs_s": pairs_s,
        "overhead": pairs_s / network_s,
    }


def alternate(
    first: Callable[[], None], second: Callable[[], None], repeats: int
) -> tuple[float, float]:
    """The median seconds of two functions that take turns."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for function, times in zip((first, second), seconds, strict=True):
            started = time.perf_counter()
            function()
            times.append(time.perf_counter() - started)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def weight(model: Any, num: int) -> float:
    """Bytes of a whole store over those of its latents."""
    import math

    from rectiflow.straighten.pair_maker import make_pairs

    prompts = [f"a scene with the number {i} in it" for i in range(num)]
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "pairs"
        make_pairs(model, prompts, store, guidance_scale=1.0, num_inference_steps=1, batch_size=64)
        size = sum(file.stat().st_size for file in store.iterdir())
    side = model.default_size
    return size / (num * 2 * math.prod(model.latent_shape(side, side)))


def wide_latents() -> Any:
    """A model with latents of 4 × 64 × 64 and a network of no width."""
    sys.path.insert(0, str(ROOT))
    from rectiflow.models import Metadata
    from rectiflow.models.sd import SDModel
    from tests.tiny_sd import tiny_sd

    pipeline = tiny_sd()
    size = 64 * pipeline.vae_scale_factor
    return SDModel(pipeline, name="wide", metadata=Metadata(default_size=size))


if __name__ == "__main__":
    main()

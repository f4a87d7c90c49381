"""Exported folders in stock diffusers: a process where rectiflow cannot be imported."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

BLOCK = """
import importlib.abc, sys

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "rectiflow":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocked())
try:
    import rectiflow
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("rectiflow can be imported")
"""

RUN = """
import json
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

torch.set_num_threads(1)
noise, made, seen = load_file("noise.safetensors"), {}, {}
for folder, calls in json.load(open("calls.json")).items():
    pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    network = getattr(pipe, "unet", None) or pipe.transformer
    rows = []
    network.register_forward_pre_hook(
        lambda module, args, given: rows.append(len(args[0] if args else given["hidden_states"])),
        with_kwargs=True,
    )
    x = noise[folder]
    for name, arguments in calls.items():
        rows.clear()
        start = x
        if type(pipe).__name__ == "FluxPipeline":
            start = pipe._pack_latents(x, *x.shape)
        made[f"{folder}/{name}"] = pipe(
            **arguments, latents=start, output_type="latent"
        ).images
        if start is not x:
            size = x.shape[-1] * pipe.vae_scale_factor
            made[f"{folder}/{name}"] = pipe._unpack_latents(
                made[f"{folder}/{name}"], size, size, pipe.vae_scale_factor
            )
        seen[f"{folder}/{name}"] = list(rows)
assert not any(name.partition(".")[0] == "rectiflow" for name in sys.modules)
save_file({name: latents.contiguous() for name, latents in made.items()}, "latents.safetensors")
json.dump(seen, open("rows.json", "w"))
"""


PLAIN = """
import json
import torch
from diffusers import DiffusionPipeline

torch.set_num_threads(1)
plan = json.load(open("plain.json"))
for name, folder in plan["folders"].items():
    drawn = []
    for told in ({}, {"dtype": torch.float32}, {"dtype": torch.bfloat16}):
        pipe = DiffusionPipeline.from_pretrained(folder, **told)
        pipe.set_progress_bar_config(disable=True)
        wanted = told.get("dtype", torch.float32)
        parts = {n: p for n, p in pipe.components.items() if isinstance(p, torch.nn.Module)}
        for part, module in parts.items():
            assert {w.dtype for w in module.parameters()} == {wanted}, (name, part, told)
        torch.manual_seed(0)
        done = pipe("a red apple", num_inference_steps=1, output_type="np", **plan["how"])
        drawn.append(done.images[0])
    assert (drawn[0] == drawn[1]).all(), name
    # The random networks of tests err more in bfloat16 than trained ones do.
    assert abs(drawn[2] - drawn[0]).mean() < 0.1, name
"""


def plainly_drawn(folders: dict[str, str], cwd: Path, then: str = "", **how: Any) -> None:
    """See that stock pipelines draw, the same without a dtype as in float32, and in bfloat16.

    Args:
        folders: By a name for messages.
        cwd: Where to leave notes.
        then: Code to run in the same process.
        **how: Of the call.
    """
    (cwd / "plain.json").write_text(json.dumps({"folders": folders, "how": how}))
    python(PLAIN + then, cwd)


def python(code: str, cwd: Path) -> str:
    """Run code where rectiflow cannot be imported; what it printed."""
    words = [sys.executable, "-I", "-c", BLOCK + code]
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_stock(
    folder: Path, noise: dict[str, Tensor], calls: dict[str, dict[str, dict[str, Any]]]
) -> tuple[dict[str, Tensor], dict[str, Sequence[int]]]:
    """Call exported pipelines.

    Args:
        folder: Where their folders are.
        noise: By the folder's name.
        calls: By the folder's name, and then by a name of the call: its arguments.

    Returns:
        The latents, and how many rows went through the network each time it was called; both by
        "folder/call".
    """
    save_file(noise, folder / "noise.safetensors")
    (folder / "calls.json").write_text(json.dumps(calls))
    python(RUN, folder)
    rows = json.loads((folder / "rows.json").read_text())
    return load_file(folder / "latents.safetensors"), rows

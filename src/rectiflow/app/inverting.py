"""``rectiflow invert``: the path from a picture to its noise, as a file to edit from later."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rectiflow.app import options
from rectiflow.app.console import evaluations, session
from rectiflow.app.results import inversion_data, method_name


def invert(
    image: Annotated[Path, typer.Argument(help="An image of any size.")],
    prompt: Annotated[
        str | None, typer.Option(help="What the image shows.", show_default=False)
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The .safetensors file to write.")
    ] = Path("inversion.safetensors"),
    model: options.ModelName = options.DEFAULT_MODEL,
    preset: options.PresetName = None,
    steps: options.Steps = None,
    settings: options.Settings = None,
    device: options.Device = None,
    dtype: options.NetworkDtype = options.Dtype.float32,
    offload: options.Offload = options.OffloadTo.none,
    base: options.Base = None,
    lora: options.Lora = None,
    as_json: options.AsJson = False,
) -> None:
    """Find the noise an image would be generated from.

    The whole path to it is kept: `rectiflow edit FILE.safetensors --to ...` edits from it
    without inverting again.
    """
    with session(as_json) as terminal:
        from rectiflow.models.images import load_image

        chosen, _ = options.preset_of(preset, settings, steps=steps)
        picture = load_image(image)
        options.output_file(output, ".safetensors")
        loaded = options.load_model(model, dtype, device, offload=offload, base=base, lora=lora)
        import rectiflow
        from rectiflow.models.memory import out_of_memory_explained

        with evaluations(loaded, "inverting"), out_of_memory_explained(loaded):
            inversion = rectiflow.invert(loaded, picture, prompt, preset=chosen)
        inversion.save(output)
        about = inversion_data(inversion)
        noise = about["noise"]
        data = {
            "model": loaded.name,
            "preset": method_name(preset, chosen),
            "settings": options.whole(chosen) | {"source_prompt": inversion.source_prompt},
            "inversion": about,
            "file": str(output),
            "warnings": terminal.warnings,
        }
        terminal.result(
            data,
            f"{output}: {inversion.nfe} network samples in {inversion.seconds:.1f} s, largest "
            f"residual {inversion.residual:.1e}\nnoise: norm {noise['norm']:.3f} (1), excess "
            f"kurtosis {noise['kurtosis']:+.2f} (0), autocorrelation "
            f"{noise['autocorrelation']:+.2f} (0)",
        )

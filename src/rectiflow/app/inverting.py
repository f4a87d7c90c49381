"""``rectiflow invert``: the path from a picture to its noise, as a file to edit from later."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from PIL import Image

from rectiflow.app import options, record
from rectiflow.app.console import session
from rectiflow.app.outputs import Outputs, Overwrite
from rectiflow.app.results import inversion_data, method_name, returned, samples, source_hash
from rectiflow.errors import InputError

if TYPE_CHECKING:
    from rectiflow.invert import Diagnosis


@options.takes_model()
def invert(
    *,
    image: Annotated[Path, typer.Argument(help="An image of any size.")],
    prompt: Annotated[
        str | None, typer.Option(help="What the image shows.", show_default=False)
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The .safetensors file to write.")
    ] = Path("inversion.safetensors"),
    reconstruct: Annotated[
        Path | None,
        typer.Option(
            metavar="PICTURE",
            help="Also write the image as it comes back from its noise; beside it, named "
            "-uncompensated, what the inversion alone brings back.",
            show_default=False,
        ),
    ] = None,
    overwrite: Overwrite = False,
    model: options.ModelOptions,
    preset: Annotated[
        str | None,
        typer.Option(
            help="Settings of a method; `rectiflow models` lists them.  [default: exact]",
            show_default=False,
        ),
    ] = None,
    steps: options.Steps = None,
    settings: options.Settings = None,
    as_json: options.AsJson = False,
) -> None:
    """Find the noise an image would be generated from.

    The whole path to it is kept: `rectiflow edit FILE.safetensors --to ...` edits from it
    without inverting again.
    """
    with session(as_json) as terminal:
        from rectiflow.invert.presets import INVERSION_PRESET
        from rectiflow.models.picture import load_image

        chosen, named = options.preset_of(preset, settings, steps=steps, default=INVERSION_PRESET)
        picture = load_image(image)
        options.output_file(output, ".safetensors")
        drawn: Outputs | None = None
        if reconstruct is not None:
            _check_pictures(reconstruct)
            pictures = [reconstruct.name, _uncompensated(reconstruct).name]
            drawn = Outputs(reconstruct.parent, pictures, overwrite=overwrite, reads=(image,))
        file = Outputs(output.parent, [output.name], overwrite=overwrite, reads=(image,))
        loaded = model.load()
        chosen = options.preset_on(loaded, chosen, preset, named)
        import rectiflow
        from rectiflow.invert import diagnosis_of
        from rectiflow.models.memory import out_of_memory_explained

        diagnosis: Diagnosis | None = None
        with out_of_memory_explained(loaded):
            inversion = rectiflow.invert(loaded, picture, prompt, preset=chosen)
            if reconstruct is not None:
                diagnosis = diagnosis_of(inversion)
        inversion.save(file.file(output.name))
        file.finish()
        about = inversion_data(inversion, diagnosis)
        nfe = {"inversion": inversion.nfe, "reconstruction": diagnosis.nfe if diagnosis else 0}
        nfe["total"] = sum(nfe.values())
        found: dict[str, Any] = {}
        lines: list[str] = []
        if reconstruct is not None and diagnosis is not None:
            made = record.of_model(loaded) | {
                "command": "invert",
                "source_prompt": inversion.source_prompt,
                "method": method_name(preset, chosen),
                "settings": options.whole(chosen),
                "source": str(image.resolve()),
                "source_hash": source_hash(image, picture),
                "nfe": nfe,
            }
            assert drawn is not None
            kept, lines = _write(reconstruct, picture, diagnosis, made, drawn)
            found = {"reconstruction": kept}
        data = {
            "model": loaded.name,
            "preset": method_name(preset, chosen),
            "settings": options.whole(chosen) | {"source_prompt": inversion.source_prompt},
            "inversion": about,
            **found,
            "nfe": nfe,
            "file": str(output),
            "warnings": terminal.warnings,
        }
        summary = f"{output}: {samples(nfe)}; the inversion took {inversion.seconds:.1f} s"
        if inversion.residual is not None:
            summary += f", largest residual {inversion.residual:.1e}"
        if (noise := about.get("noise")) is not None:
            summary += (
                f"\nnoise: norm {noise['norm']:.3f} (1), excess kurtosis {noise['kurtosis']:+.2f} "
                f"(0), autocorrelation {noise['autocorrelation']:+.2f} (0)"
            )
        terminal.result(data, "\n".join([summary, *lines]))


def _write(
    file: Path, picture: Image.Image, diagnosis: Diagnosis, made: dict[str, Any], drawn: Outputs
) -> tuple[dict[str, Any], list[str]]:
    """Write what came back with and without compensation; its JSON, and a line on each."""
    from rectiflow.report import save_picture
    from rectiflow.report.words import decibels

    exact, plain = diagnosis.reconstruction, diagnosis.uncompensated
    beside, kept = _uncompensated(file), returned(diagnosis, picture)
    save_picture(
        exact.image, drawn.file(file.name), made | {"role": "reconstruction", "compensated": True}
    )
    save_picture(
        plain.image,
        drawn.file(beside.name),
        made | {"role": "reconstruction", "compensated": False},
    )
    drawn.finish()
    lines = [
        f"{file}: {decibels(kept['psnr'])} to the image (codec alone: "
        f"{decibels(kept['psnr_codec'])}), largest latent error {exact.max_abs_latent:.1e}",
        f"{beside}: {decibels(kept['uncompensated_psnr'])} to what the codec gives",
    ]
    return kept | {"image": str(file), "uncompensated": str(beside)}, lines


def _uncompensated(file: Path) -> Path:
    return file.with_stem(f"{file.stem}-uncompensated")


def _check_pictures(file: Path) -> None:
    """See that both pictures can be written."""
    for written in (file, _uncompensated(file)):
        if written.suffix.lower() not in options.PICTURES:
            endings = ", ".join(options.PICTURES)
            raise InputError(f"--reconstruct {written} should end in one of {endings}")
        if written.is_dir():
            raise InputError(f"--reconstruct {written} is a folder: give a file")

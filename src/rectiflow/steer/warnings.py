"""What a user should know before trusting an edit, in plain words."""

from __future__ import annotations

from collections.abc import Sequence

from rectiflow.invert.domain import findings
from rectiflow.invert.presets import Preset
from rectiflow.invert.trajectory import Inversion
from rectiflow.models.guidance import guided
from rectiflow.models.prompts import doubt_of_syntax
from rectiflow.report.pictures import psnr
from rectiflow.steer.region import size_warning


def edit_warnings(
    inversion: Inversion, targets: Sequence[str], negative_prompt: str | None, preset: Preset
) -> list[str]:
    """What is doubtful about an edit; whole sentences, the model's own cautions first.

    Args:
        inversion: what is edited from.
        targets: the prompts.
        negative_prompt: what guidance is to push away from.
        preset: the settings.
    """
    found = list(inversion.model.cautions)
    prompts = [inversion.source_prompt, *targets]
    for segment in inversion.model.tokenize(prompts):
        for prompt, cut in dict(zip(prompts, segment.cut, strict=True)).items():
            if cut:
                found.append(
                    f"The prompt {prompt!r} is longer than the {segment.length} tokens "
                    f"{segment.name} takes: {cut!r} is left out."
                )
    for prompt in dict.fromkeys([*prompts, negative_prompt or ""]):
        if doubt := inversion.model.metadata.doubt_of_words(inversion.model.name, prompt):
            found.append(f"{doubt}.")
        if doubt := doubt_of_syntax(prompt):
            found.append(f"{doubt}.")
    unused = preset.inversion_prompt == "empty" and preset.method == "rf_inversion"
    if not inversion.source_prompt and not unused:
        found.append(
            "No source prompt was given, so the empty prompt stands for what the image shows; "
            "saying what it shows usually keeps more of it."
        )
    _, alpha = guided(
        inversion.model, inversion.conditioning, preset.guidance_scale, preset.true_cfg_scale
    )
    model = inversion.model
    if doubt := model.metadata.doubt(model.name, preset.num_inference_steps, alpha):
        found.append(f"{doubt}.")
    if (text := size_warning(inversion.restore)) is not None:
        found.append(text)
    if negative_prompt and alpha == 1:
        scale = "true_cfg_scale" if inversion.model.guidance_embeds else "guidance_scale"
        found.append(
            f"The negative prompt has no effect without guidance. Raise {scale} above 1 to use it."
        )
    return found + unknown_image(inversion)


def unknown_image(inversion: Inversion) -> list[str]:
    """A warning if the model does not seem to know the image, else nothing.

    Args:
        inversion: of the image.
    """
    seen = findings(inversion)
    if not seen:
        return []
    model, said = inversion.model, "; ".join(str(finding) for finding in seen)
    knows = f" (it knows {model.metadata.knows})" if model.metadata.knows else ""
    back = ""
    if inversion.picture is not None:
        returned = psnr(inversion.images(inversion.latents)[0], inversion.picture)
        back = f"Unedited it comes back at {returned:.1f} dB, which is all its codec keeps of it. "
    return [
        f"{model.name} does not seem to know images like this one{knows}: {said}. {back}Edits of "
        "it may look wrong. A source prompt that says what the image shows may help, else a model "
        "trained on such images (--model)."
    ]

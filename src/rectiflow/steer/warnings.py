"""What a user should know before trusting an edit, in plain words."""

from __future__ import annotations

from collections.abc import Sequence

from rectiflow.invert.presets import Preset
from rectiflow.invert.trajectory import Inversion


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
    if not inversion.source_prompt:
        found.append(
            "No source prompt was given, so the image was inverted under the empty prompt; "
            "saying what it shows usually keeps more of it."
        )
    if negative_prompt and preset.guidance_scale == 1:
        found.append("The negative prompt has no effect at guidance 1.")
    noise = inversion.noise_statistics
    if noise is not None and (abs(noise.norm - 1) > 0.25 or abs(noise.autocorrelation) > 0.25):
        found.append(
            f"The noise found is unlike N(0, I) (norm {noise.norm:.2f} instead of 1, neighbours "
            f"correlate by {noise.autocorrelation:.2f}): the model does not know images like this "
            "one, and edits may look wrong although the reconstruction is exact."
        )
    return found

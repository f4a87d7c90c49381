"""A one-step model as ONNX: text encoder, denoiser and decoder, a file each.

`text_encoder.onnx` turns token ids into what the network looks up, `denoiser.onnx` noise into
latents in one step, the Euler update and the scales of the path included, and `decoder.onnx`
latents into pixels in [0, 1]. Any batch size goes through, and pictures of any height and width
that the U-Net's levels divide.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rectiflow.errors import InputError, WorkError, install
from rectiflow.files import final_name, unfinished_folder
from rectiflow.flow.diffusion import variance_preserving
from rectiflow.flow.path import convert
from rectiflow.models.base import FlowModel
from rectiflow.models.lora import merge_loras
from rectiflow.models.unet import UNetModel
from rectiflow.straighten.card import CARD, PROMPT, environment

PACKAGES = ("onnx", "onnxruntime", "onnxscript")
TOLERANCE = 1e-3
"""By how much onnxruntime's outputs may differ from PyTorch's, relative to the largest."""
MOST_IN_ONE_FILE = 3 * 2**29
"""Bytes of weights; protobuf allows less than 2 GiB, and beyond this they go to `….onnx.data`."""


def check_onnx(model: FlowModel | None = None) -> None:
    """See that ONNX files can be written.

    Args:
        model: Of it, if it is known already.

    Raises:
        InputError: A package is missing, or the model is of another family.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"ONNX needs {', '.join(missing)}: {install('onnx')}")
    if model is not None and not isinstance(model, UNetModel):
        raise InputError(
            f"{model.name} is of the family {model.family}: ONNX is for one-step models of the "
            "Stable Diffusion family"
        )


def export_onnx(model: FlowModel, folder: Path) -> list[Path]:
    """Write a one-step model's three parts, and see that onnxruntime computes what PyTorch does.

    Args:
        model: Of the Stable Diffusion family; on the CPU.
        folder: For the files, in the model's own; replaced whole. A README.md says how to run them.

    Returns:
        The files: `text_encoder.onnx` (`input_ids`, for SDXL `input_ids_2` too -> `embeds`, for
        SDXL `pooled` too), `denoiser.onnx` (`noise`, `embeds`, … -> `latents`) and `decoder.onnx`
        (`latents` -> `images`, [B, 3, H, W] in [0, 1]); all float32.

    Raises:
        InputError: As `check_onnx`.
        WorkError: onnxruntime's outputs differ by more than 1e-3.
    """
    check_onnx(model)
    assert isinstance(model, UNetModel)
    temporary = unfinished_folder(folder)
    try:
        with _quiet(), torch.no_grad():
            for part in _parts(model):
                part.write(temporary)
                part.check(temporary)
        (temporary / CARD).write_text(_usage(model, folder), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return sorted(folder.glob("*.onnx"))


class TextEncoder(nn.Module):
    """Token ids [B, length], of one or two encoders, to embeddings, and SDXL's pooled feature."""

    def __init__(self, model: UNetModel) -> None:
        super().__init__()
        pipeline = model.pipeline
        encoders = [pipeline.text_encoder]
        self.xl = model.family == "sdxl"
        if self.xl:
            encoders.append(pipeline.text_encoder_2)
        self.encoders = nn.ModuleList([plain(part) for part in encoders if part is not None])

    def forward(self, *input_ids: Tensor) -> tuple[Tensor, ...]:
        """The embeddings [B, length, width] (and pooled [B, width])."""
        if not self.xl:
            return (self.encoders[0](input_ids[0])[0],)
        found = [
            encoder(ids, output_hidden_states=True)
            for encoder, ids in zip(self.encoders, input_ids, strict=True)
        ]
        # The last but one layer, as SDXL was trained with.
        embeds = torch.cat([one.hidden_states[-2] for one in found], dim=-1)
        # Of the first encoder that has one: the other's first output are its tokens' features.
        return embeds, next(one[0] for one in found if one[0].ndim == 2)


class OneStep(nn.Module):
    """From noise to latents in one Euler step of the student: `latents = α noise + β network`.

    Args:
        model: Whose field.
    """

    guidance: Tensor | None

    def __init__(self, model: UNetModel) -> None:
        super().__init__()
        self.network = plain(model.network)
        self.timestep = float(model.num_train_timesteps - 1)  # of `student_grid(1)`
        self.scale, self.alpha, self.beta = coefficients(model)
        self.xl = model.family == "sdxl"
        self.factor = model.factor
        self.register_buffer("guidance", _guidance(model), persistent=False)

    def forward(self, noise: Tensor, embeds: Tensor, pooled: Tensor | None = None) -> Tensor:
        """Latents [B, C, h, w] of noise [B, C, h, w] and embeddings."""
        more: dict[str, Any] = {}
        if self.xl:
            height, width = (self.factor * side for side in noise.shape[-2:])
            ones = torch.ones(noise.shape[0])
            sizes = [height * ones, width * ones, 0 * ones, 0 * ones, height * ones, width * ones]
            more["added_cond_kwargs"] = {
                "text_embeds": pooled,
                "time_ids": torch.stack(sizes, dim=1),
            }
        if self.guidance is not None:
            more["timestep_cond"] = self.guidance
        timestep = torch.tensor(self.timestep)
        prediction = self.network(
            self.scale * noise, timestep, encoder_hidden_states=embeds, return_dict=False, **more
        )[0]
        return self.alpha * noise + self.beta * prediction


class Decoder(nn.Module):
    """Latents [B, C, h, w] to images [B, 3, H, W] in [0, 1]."""

    def __init__(self, model: UNetModel) -> None:
        super().__init__()
        self.vae: Any = plain(model.pipeline.vae)
        self.factor = float(model.pipeline.vae.config.scaling_factor)

    def forward(self, latents: Tensor) -> Tensor:
        """The images."""
        images = self.vae.decode(latents / self.factor, return_dict=False)[0]
        return (images / 2 + 0.5).clamp(0, 1)


def coefficients(model: UNetModel) -> tuple[float, float, float]:
    """(k, α, β) of one step: the network sees k noise, the latents are α noise + β prediction."""
    t = model.student_grid(1)[0].double()
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    if model.diffusion_path is None:
        return 1.0, 1.0, -float(1 - t)
    a, b = variance_preserving(t)
    start = model.initial_state(one)  # on the straight path; the network's own is (a + b) times it
    x_t = (a + b) * start

    def step(x: Tensor, prediction: Tensor) -> float:
        source = model.prediction_type
        v = convert(prediction, x * x_t, a, b, source=source, target="velocity")
        return float(x * start + (1 - t) * v)

    return float(x_t), step(one, zero), step(zero, one)


def plain(part: nn.Module) -> nn.Module:
    """A copy of a network in float32, its LoRAs merged, ready to be written."""
    copied = copy.deepcopy(part).float().eval()
    if getattr(copied, "peft_config", None):
        merge_loras(copied)
    return copied


def tokens(model: UNetModel, prompts: list[str]) -> list[Tensor]:
    """The ids [B, length] that each text encoder is given."""
    pipeline = model.pipeline
    tokenizers = [pipeline.tokenizer]
    if model.family == "sdxl":
        tokenizers.append(pipeline.tokenizer_2)
    return [
        tokenizer(
            prompts,
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        for tokenizer in tokenizers
        if tokenizer is not None
    ]


class _Part:
    """A module to be written, with inputs to write and to check it by."""

    def __init__(
        self,
        name: str,
        module: nn.Module,
        inputs: dict[str, Tensor],
        outputs: tuple[str, ...],
        multiple: int = 1,
    ) -> None:
        self.name, self.module, self.inputs, self.outputs = name, module.eval(), inputs, outputs
        self.multiple = multiple
        """Of which height and width of a picture-like input are to be multiples."""
        self.bytes = sum(weight.nbytes for weight in module.state_dict().values())

    def write(self, folder: Path) -> None:
        batch = torch.export.Dim("batch", min=1, max=1024)
        height, width = (torch.export.Dim(name, min=1, max=1024) for name in ("height", "width"))
        sides = {2: self.multiple * height, 3: self.multiple * width}
        shapes = tuple({0: batch} | (sides if x.ndim == 4 else {}) for x in self.inputs.values())
        torch.onnx.export(
            self.module,
            tuple(self.inputs.values()),
            folder / f"{self.name}.onnx",
            input_names=list(self.inputs),
            output_names=list(self.outputs),
            dynamic_shapes=(shapes,) if isinstance(self.module, TextEncoder) else shapes,
            dynamo=True,
            verbose=False,
            external_data=self.bytes > MOST_IN_ONE_FILE,
        )

    def check(self, folder: Path) -> None:
        """Run the file on batches of 1 and 2, the one higher and the other wider, and compare."""
        import onnxruntime

        runtime = onnxruntime.InferenceSession(
            str(folder / f"{self.name}.onnx"), providers=["CPUExecutionProvider"]
        )
        for count in (1, 2):
            rows = {name: value[:count] for name, value in self.inputs.items()}
            if count == 1:
                turned = {name: x.mT.contiguous() for name, x in rows.items() if x.ndim == 4}
                rows |= turned
            expected = self.module(*rows.values())
            expected = expected if isinstance(expected, tuple) else (expected,)
            got = runtime.run(None, {name: value.numpy() for name, value in rows.items()})
            for name, wanted, found in zip(self.outputs, expected, got, strict=True):
                off = float((torch.from_numpy(found) - wanted).abs().max())
                if not off <= TOLERANCE * max(1.0, float(wanted.abs().max())):
                    raise WorkError(
                        f"{self.name}.onnx: {name} differs from PyTorch's by {off:.2g} with a "
                        f"batch of {count}: the installed onnxscript may be too old"
                    )


def _parts(model: UNetModel) -> Iterator[_Part]:
    ids = tokens(model, ["", PROMPT])
    names = ("embeds", "pooled")[: len(ids)] if model.family == "sdxl" else ("embeds",)
    encoder = TextEncoder(model)
    inputs = dict(zip(("input_ids", "input_ids_2"), ids, strict=False))
    yield _Part("text_encoder", encoder, inputs, names)
    noise = example_noise(model)
    texts = dict(zip(names, encoder(*ids), strict=True))
    denoiser = OneStep(model)
    inputs = {"noise": noise, **texts}
    yield _Part("denoiser", denoiser, inputs, ("latents",), cells_at_least(model))
    latents = denoiser(noise, **texts)
    yield _Part("decoder", Decoder(model), {"latents": latents}, ("images",))


def cells_at_least(model: UNetModel) -> int:
    """Of which height and width of latents are multiples, so that every level of the U-Net fits."""
    return int(2 ** (len(model.network.config.block_out_channels) - 1))


def example_noise(model: UNetModel) -> Tensor:
    """Noise to write by: not square, and nowhere a single cell, which would be written as such."""
    unit = cells_at_least(model)
    channels, side, _ = model.latent_shape(model.default_size, model.default_size)
    side = max(2, side // unit) * unit
    generator = torch.Generator().manual_seed(0)
    return torch.randn((2, channels, side, side + unit), generator=generator)


def _usage(model: UNetModel, folder: Path) -> str:
    """How the files are run, in Markdown."""
    xl = model.family == "sdxl"
    parts = ("tokenizer", "tokenizer_2")[: 1 + xl]
    places = [part for part in parts if getattr(model.pipeline, part, None) is not None]
    return (
        environment()
        .get_template("onnx.md.j2")
        .render(
            name=final_name(folder.parent),
            folder=folder.name,
            multiple=cells_at_least(model) * model.factor,
            size=model.default_size,
            factor=model.factor,
            channels=model.latent_shape(model.default_size, model.default_size)[0],
            inputs=list(zip(("input_ids", "input_ids_2"), places, strict=False)),
            pooled=xl,
            prompt=PROMPT,
        )
    )


def _guidance(model: UNetModel) -> Tensor | None:
    """What a network that is told a guidance scale is told: the model's default."""
    if not model.guidance_embeds:
        return None
    scale = torch.tensor([model.default_guidance_scale - 1])
    width = model.network.config.time_cond_proj_dim
    return model.pipeline.get_guidance_scale_embedding(scale, embedding_dim=width).float()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's hints to itself."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)

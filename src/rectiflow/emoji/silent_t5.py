"""A T5 that says nothing, for a pipeline trained without one.

`StableDiffusion3Pipeline.from_pretrained` asks for a T5 unless it is told in so many words that
there is none. Without a T5 the pipeline puts zeros on its text positions; so does this one, whose
tokenizer drops all text and whose last norm is zero. With it the folder loads in stock diffusers
like any other.
"""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, models, normalizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel


def silent_tokenizer(length: int) -> PreTrainedTokenizerFast:
    """A tokenizer that hears nothing: every prompt is the end token alone."""
    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(Regex(r"[\s\S]+"), "")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=length,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
    )


def silent_encoder(width: int) -> T5EncoderModel:
    """An encoder of the given output width whose output is zero."""
    config = T5Config(
        vocab_size=3, d_model=width, d_kv=8, d_ff=8, num_layers=1, num_heads=1, use_cache=False
    )
    encoder = T5EncoderModel(config).eval()
    encoder.encoder.final_layer_norm.weight.data.zero_()
    return encoder

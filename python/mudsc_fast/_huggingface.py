"""Hugging Face models: their classes, and inputs to run them on."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_SAMPLES, _TOKENS = 2, 16
#: Number of audio frames after the convolutions.
_FRAMES = 40
#: Side of the images for models whose configuration does not name one; they accept any size.
_IMAGE_SIDE = 64


#: Outputs of Hugging Face models whose order is fixed; hidden states follow the units.
_ORDERED_OUTPUTS = (
    "logits",
    "prediction_logits",
    "start_logits",
    "end_logits",
    "logits_per_image",
    "image_embeds",
    "text_embeds",
)


def config_of(model: object) -> Mapping[str, Any] | None:
    """Return the configuration of a Hugging Face model as a dict, None for other models."""
    to_dict = getattr(getattr(model, "config", None), "to_dict", None)
    config = to_dict() if callable(to_dict) else None
    return config if isinstance(config, Mapping) else None


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers from showing warnings and progress while the enclosed code runs.

    It is not imported for that, which takes more than a second: code that may be the first to import it must do so
    before.
    """
    if "transformers" not in sys.modules:
        yield
        return
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def class_of_config(transformers: Any, config: Mapping[str, Any]) -> Any:
    """Return the class of transformers that a configuration names.

    Raises
    ------
    ValueError
        If there is no such class, or transformers cannot import what the class needs.
    """
    names = config.get("architectures") or ["AutoModel"]
    try:
        kind = getattr(transformers, names[0], None)  # imports the module of the class
    except ImportError as error:
        cause = error.__cause__ or error
        raise ValueError(
            f"transformers cannot import {names[0]}, which config.json names: {type(cause).__name__}: {cause}. Check "
            "that the installed packages fit together, for example torchvision and torch"
        ) from error
    if kind is None:
        raise ValueError(
            f"transformers has no {names[0]}, which config.json names: pass a spec, a family such as 'bert' or a .json "
            "file, or the model and data"
        )
    return kind


def build_without_weights(config: Mapping[str, Any]) -> nn.Module:
    """Return the model that a configuration describes, on the meta device.

    Raises
    ------
    ValueError
        If transformers is missing, or does not know the model.
    """
    kind = str(config.get("model_type"))
    try:
        import transformers
    except ImportError as error:
        raise ValueError(
            f"deriving the spec of the model type {kind!r} needs transformers: pip install transformers, or pass a spec"
        ) from error
    try:
        network = class_of_config(transformers, config)
        rest = {name: value for name, value in config.items() if name != "model_type"}
        configuration = transformers.AutoConfig.for_model(kind, **rest)
        with quiet_transformers(), torch.device("meta"):
            automatic = network is transformers.AutoModel
            model: nn.Module = network.from_config(configuration) if automatic else network(configuration)
    except Exception as error:  # transformers may raise anything
        raise ValueError(
            f"building a network of the model type {kind!r} by transformers failed: {type(error).__name__}: {error}"
        ) from error
    return model


def random_inputs(model: nn.Module) -> dict[str, Tensor]:
    """Return random tokens, pixels or sounds for a Hugging Face model, an empty dict if it takes none of these.

    Decoders of sequence-to-sequence models get tokens of their own.
    """
    taken = inspect.signature(model.forward).parameters
    config: Any = getattr(model, "config", None)
    generator = torch.Generator().manual_seed(0)
    inputs = {}
    text = getattr(config, "text_config", config)
    if "input_ids" in taken and hasattr(text, "vocab_size"):
        length = min(_TOKENS, getattr(text, "max_position_embeddings", _TOKENS))
        inputs["input_ids"] = torch.randint(text.vocab_size, (_SAMPLES, length), generator=generator, device="cpu")
    if "input_features" in taken and hasattr(config, "num_mel_bins") and hasattr(config, "max_source_positions"):
        # Whisper: two frames for each position, as its second convolution has stride 2.
        inputs["input_features"] = torch.randn(
            (_SAMPLES, config.num_mel_bins, 2 * config.max_source_positions),
            generator=generator,
            dtype=torch.float32,
            device="cpu",
        )
    if "input_values" in taken and hasattr(config, "conv_stride"):
        # Wav2vec 2.0 and its kind: enough samples of a sound for a few frames behind all convolutions.
        length = _FRAMES * math.prod(config.conv_stride)
        inputs["input_values"] = torch.randn((_SAMPLES, length), generator=generator, dtype=torch.float32, device="cpu")
    if "decoder_input_ids" in taken and getattr(config, "is_encoder_decoder", False) and inputs:
        inputs["decoder_input_ids"] = torch.randint(
            text.vocab_size, (_SAMPLES, _TOKENS // 2), generator=generator, device="cpu"
        )
    vision = getattr(config, "vision_config", config)
    if "pixel_values" in taken and hasattr(vision, "num_channels"):
        size = getattr(vision, "image_size", _IMAGE_SIDE)
        sides = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
        shape = (_SAMPLES, vision.num_channels, *sides)
        inputs["pixel_values"] = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
    return inputs


def ordered_outputs(output: Any) -> Any:
    """Return the outputs of a model that do not change when its units are permuted, in their containers.

    For Hugging Face models, these are the logits and projected embeddings. Caches of keys follow the order of the
    heads, and the last hidden state may follow the units: its features are returned in the order of their values.
    Outputs of other models are returned as they are.
    """
    if not isinstance(output, Mapping):
        return output
    found = [output[name] for name in _ORDERED_OUTPUTS if isinstance(output.get(name), Tensor)]
    if not found and isinstance(output.get("last_hidden_state"), Tensor):
        return [output["last_hidden_state"].sort(-1).values]
    return found or output

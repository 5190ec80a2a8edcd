"""Models of Hugging Face: their classes, and inputs to run them on."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

_SAMPLES, _TOKENS = 2, 16
#: Side of the images for models whose configuration does not name one: they take any.
_IMAGE_SIDE = 64


def config_of(model: object) -> Mapping[str, Any] | None:
    """Return the configuration of a model of Hugging Face as a dict, None for other models."""
    to_dict = getattr(getattr(model, "config", None), "to_dict", None)
    config = to_dict() if callable(to_dict) else None
    return config if isinstance(config, Mapping) else None


def class_of_config(transformers: Any, config: Mapping[str, Any]) -> Any:
    """Return the class of transformers that a configuration names.

    Raises
    ------
    ValueError
        If there is no such class.
    """
    names = config.get("architectures") or ["AutoModel"]
    kind = getattr(transformers, names[0], None)
    if kind is None:
        raise ValueError(f"transformers has no {names[0]}, which config.json names")
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
            f"deriving the spec of the model type {kind!r} needs transformers: pip install 'mudsc-fast[huggingface]', "
            "or pass a spec"
        ) from error
    try:
        network = class_of_config(transformers, config)
        rest = {name: value for name, value in config.items() if name != "model_type"}
        configuration = transformers.AutoConfig.for_model(kind, **rest)
        with torch.device("meta"):
            automatic = network is transformers.AutoModel
            model: nn.Module = network.from_config(configuration) if automatic else network(configuration)
    except Exception as error:  # whatever transformers raises
        raise ValueError(
            f"building a network of the model type {kind!r} by transformers failed: {type(error).__name__}: {error}"
        ) from error
    return model


def random_inputs(model: nn.Module) -> dict[str, Tensor]:
    """Return random tokens and pixels for a model of Hugging Face, as far as it takes them; else an empty dict."""
    taken = inspect.signature(model.forward).parameters
    config: Any = getattr(model, "config", None)
    generator = torch.Generator().manual_seed(0)
    inputs = {}
    text = getattr(config, "text_config", config)
    if "input_ids" in taken and hasattr(text, "vocab_size"):
        length = min(_TOKENS, getattr(text, "max_position_embeddings", _TOKENS))
        inputs["input_ids"] = torch.randint(text.vocab_size, (_SAMPLES, length), generator=generator, device="cpu")
    vision = getattr(config, "vision_config", config)
    if "pixel_values" in taken and hasattr(vision, "num_channels"):
        size = getattr(vision, "image_size", _IMAGE_SIDE)
        sides = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
        shape = (_SAMPLES, vision.num_channels, *sides)
        inputs["pixel_values"] = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
    return inputs

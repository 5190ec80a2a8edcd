"""Families of networks: recognized by tensor names or configuration, and built from the information in them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from mudsc_fast._similar_names import similar_names
from mudsc_fast.spec.families.bert import bert
from mudsc_fast.spec.families.clip import Tower, clip_huggingface, clip_openai
from mudsc_fast.spec.families.gpt2 import gpt2
from mudsc_fast.spec.families.layers import Head
from mudsc_fast.spec.families.llama import llama
from mudsc_fast.spec.families.mlp import mlp
from mudsc_fast.spec.families.resnet import resnet
from mudsc_fast.spec.families.swin import swin
from mudsc_fast.spec.families.vgg import vgg
from mudsc_fast.spec.families.vit import vit, vit_huggingface
from mudsc_fast.spec.permutation_spec import PermutationSpec

Tensors = Mapping[str, Tensor]

#: Tensors that a specification need not name: tables that are not weights, and values per token or for a whole model.
_FREE_TENSORS = re.compile(
    r"logit_(scale|bias)$|attn\.(masked_)?bias$|position_ids$|inv_freq$|num_batches_tracked$"
    r"|^cls\.predictions\.(decoder\.)?bias$|attn_mask$|relative_position_index$"
)


def build_family(name: str, numbers: Mapping[str, int], tensors: Tensors, config: Mapping[str, Any]) -> PermutationSpec:
    """Return the spec of a network of one family.

    Parameters
    ----------
    name
        The family, one of :func:`family_names`.
    numbers
        Numbers that tensor shapes do not determine, e.g. ``{"num_heads": 12}``.
    tensors
        The tensors by name.
    config
        The entries of the network's configuration. For Hugging Face families they replace missing `numbers`.

    Raises
    ------
    ValueError
        If the family is unknown, a number is missing or unknown, or the tensors are not those of the family.
    """
    if name not in _FAMILIES:
        raise ValueError(
            f"spec must name a family, 'derive', or a .json file, got {name!r}; "
            + similar_names(name, (), sorted(_FAMILIES))
        )
    options = _Options(name, numbers, config)
    try:
        spec = _FAMILIES[name](tensors, options)
        options.check_all_used()
    except _OptionError as error:
        raise ValueError(str(error)) from None
    except (ValueError, KeyError, IndexError) as error:
        raise ValueError(f"the tensors are not those of the family {name}: {error}") from error
    problems = spec.problems(tensors)
    if problems:
        raise ValueError(f"the spec of the family {name} does not fit the tensors: {listed(problems)}")
    # A tensor whose axes the spec does not know would fall out of sync with the units that it reads or writes.
    unnamed = [
        name
        for name, tensor in tensors.items()
        if name not in spec.layouts and tensor.is_floating_point() and tensor.ndim and not _FREE_TENSORS.search(name)
    ]
    if unnamed:
        raise ValueError(
            f"the spec of the family {name} does not name {len(unnamed)} tensors, {', '.join(unnamed[:5])}: this is "
            "another architecture or a variant. Derive the spec with PermutationSpec.from_model, or write it as a "
            ".json file"
        )
    return spec


def family_of_config(config: Mapping[str, Any]) -> str | None:
    """Return the family that a configuration's ``model_type`` names, if there is one."""
    return _FAMILY_OF_MODEL_TYPE.get(str(config.get("model_type")))


def family_of_names(tensors: Tensors) -> str | None:
    """Return the family that is recognized by the tensor names, if there is one."""
    for marks, family in _MARKS:
        if all(any(re.search(mark, name) for name in tensors) for mark in marks):
            return family
    return "mlp" if _chain(tensors) is not None else None


def family_names() -> str:
    """Return the names of all families, separated by commas."""
    return ", ".join(sorted(_FAMILIES))


def listed(problems: Sequence[str]) -> str:
    """Return the first ten problems, one per line."""
    more = [f"... and {len(problems) - 10} more"] if len(problems) > 10 else []
    return "\n  ".join(["", *problems[:10], *more])


class _OptionError(ValueError):
    """A number that the family needs is missing, or a given number is unknown to the family."""


class _Options:
    """Numbers that describe a network, given by the user or read from its configuration."""

    def __init__(self, family: str, given: Mapping[str, int], config: Mapping[str, Any]) -> None:
        self._family = family
        self._given = given
        self._config = config
        self._used: set[str] = set()

    def number(self, name: str, *in_config: str, section: str = "", default: int | None = None) -> int:
        """Return a number. `in_config` are its names in the configuration, or in a section of the configuration."""
        self._used.add(name)
        config = self._config.get(section, self._config) if section else self._config
        found = [config[key] for key in in_config if config.get(key) is not None]
        value = self._given.get(name, found[0] if found else default)
        if not isinstance(value, int):
            raise _OptionError(
                f"tensor shapes do not determine {name} of the family {self._family}: pass spec "
                f"'{self._family}:{name}=N'"
            )
        return value

    def flag(self, name: str, default: bool) -> bool:
        """Return a boolean entry of the configuration."""
        return bool(self._config.get(name, default))

    def check_all_used(self) -> None:
        """Raise an error if a given number is unknown to the family."""
        unknown = [name for name in self._given if name not in self._used]
        if unknown:
            taken = ", ".join(sorted(self._used)) or "none"
            raise _OptionError(f"the family {self._family} has no number {unknown[0]!r}; it takes: {taken}")


def _count(tensors: Iterable[str], pattern: str) -> int:
    """Return the number of layers: one more than the greatest index that `pattern` finds in the names."""
    found = [int(match[1]) for name in tensors if (match := re.match(pattern, name))]
    if not found:
        raise ValueError(f"no tensor name begins with the pattern {pattern}")
    return max(found) + 1


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _chain(tensors: Tensors) -> list[str] | None:
    """Return the layers, in order, if the tensors are numbered linear layers that each fit the one before."""
    weights = sorted((name for name in tensors if name.endswith(".weight")), key=_natural)
    layers = [name.removesuffix(".weight") for name in weights]
    biases = [name for name in tensors if not name.endswith(".weight")]
    alike = len({re.sub(r"\d+", "0", layer) for layer in layers}) == 1
    shapes = [tuple(tensors[weight].shape) for weight in weights]
    if len(layers) < 2 or not alike or any(len(shape) != 2 for shape in shapes):
        return None
    if any(first[0] != second[1] for first, second in itertools.pairwise(shapes)):
        return None
    return layers if set(biases) in (set(), {f"{layer}.bias" for layer in layers}) else None


def _mlp(tensors: Tensors, _: _Options) -> PermutationSpec:
    layers = _chain(tensors)
    if layers is None:
        raise ValueError("expected only linear layers, numbered in order, all with bias or all without")
    return mlp(layers, bias=f"{layers[0]}.bias" in tensors)


def _resnet(tensors: Tensors, options: _Options) -> PermutationSpec:
    stages = _count(tensors, r"layer(\d+)\.") - 1
    blocks = [_count(tensors, rf"layer{stage}\.(\d+)\.") for stage in range(1, stages + 1)]
    statistics = "bn1.running_mean" in tensors
    return resnet(
        blocks,
        bottleneck="layer1.0.conv3.weight" in tensors,
        names="cifar" if "linear.weight" in tensors else "torchvision",
        norm_groups=None if statistics else options.number("norm_groups"),
    )


def _vgg(tensors: Tensors, _: _Options) -> PermutationSpec:
    def layers(part: str, axes: int) -> list[int]:
        weight = re.compile(rf"{part}\.(\d+)\.weight")
        found = [(match, tensors[name]) for name in tensors if (match := weight.fullmatch(name))]
        return sorted(int(match[1]) for match, tensor in found if tensor.ndim == axes)

    convolutions, linears = layers("features", 4), layers("classifier", 2)
    batch_norms = "features.1.running_mean" in tensors
    step = 3 if batch_norms else 2
    counts = [1]
    for before, after in itertools.pairwise(convolutions):
        if after - before == step:
            counts[-1] += 1
        else:
            counts.append(1)
    channels = tensors[f"features.{convolutions[-1]}.weight"].shape[0]
    return vgg(
        counts,
        batch_norms=batch_norms,
        positions=tensors[f"classifier.{linears[0]}.weight"].shape[1] // channels,
        classifier=[f"classifier.{index}" for index in linears],
    )


def _vit(tensors: Tensors, options: _Options) -> PermutationSpec:
    return vit(
        _count(tensors, r"blocks\.(\d+)\."),
        options.number("num_heads"),
        tensors["patch_embed.proj.weight"].shape[0],
        class_token="cls_token" in tensors,
        qkv_bias="blocks.0.attn.qkv.bias" in tensors,
    )


def _swin(tensors: Tensors, _: _Options) -> PermutationSpec:
    stages = range(_count(tensors, r"layers\.(\d+)\."))
    blocks = [_count(tensors, rf"layers\.{stage}\.blocks\.(\d+)\.") for stage in stages]
    table = "layers.{}.blocks.0.attn.relative_position_bias_table"
    heads = [tensors[table.format(stage)].shape[1] for stage in stages]
    return swin(blocks, heads, tensors["patch_embed.proj.weight"].shape[0])


def _clip_openai(tensors: Tensors, options: _Options) -> PermutationSpec:
    def tower(name: str, blocks: str, norm: str) -> Tower:
        width = tensors[norm].shape[0]
        # Heads are 64 wide in all networks that OpenAI published, and its own loader relies on that.
        published = width // 64 if width in (512, 768, 1024) else None
        heads = options.number(f"{name}_heads", default=published)
        return Tower(_count(tensors, rf"{blocks}\.(\d+)\."), heads, width)

    vision = (
        tower("vision", r"visual\.transformer\.resblocks", "visual.ln_post.weight")
        if "visual.ln_post.weight" in tensors
        else None
    )
    text = tower("text", r"transformer\.resblocks", "ln_final.weight") if "ln_final.weight" in tensors else None
    return clip_openai(vision, text)


def _clip_huggingface(tensors: Tensors, options: _Options) -> PermutationSpec:
    def tower(name: str, first_norm: str, default: int) -> Tower | None:
        if f"{name}_model.{first_norm}.weight" not in tensors:
            return None
        width = tensors[f"{name}_model.{first_norm}.weight"].shape[0]
        layers = _count(tensors, rf"{name}_model\.encoder\.layers\.(\d+)\.")
        heads = options.number(f"{name}_heads", "num_attention_heads", section=f"{name}_config", default=default)
        return Tower(layers, heads, width)

    # Hugging Face files omit numbers of heads that are defaults; these are the defaults.
    return clip_huggingface(tower("vision", "pre_layrnorm", 12), tower("text", "final_layer_norm", 8))


def _vit_huggingface(tensors: Tensors, options: _Options) -> PermutationSpec:
    published = any(name.startswith("vit.encoder.") for name in tensors)
    layers = _count(tensors, r"vit\.encoder\.layer\.(\d+)\." if published else r"vit\.layers\.(\d+)\.")
    return vit_huggingface(layers, options.number("num_heads", "num_attention_heads"), checkpoint_names=published)


def _bert(tensors: Tensors, options: _Options) -> PermutationSpec:
    masked = "cls.predictions.transform.dense.weight" in tensors
    spec = bert(
        _count(tensors, r"bert\.encoder\.layer\.(\d+)\."),
        options.number("num_heads", "num_attention_heads"),
        head="masked_lm" if masked else "classifier",
    )
    tied = "cls.predictions.decoder.weight"
    return spec.without([tied]) if masked and tied not in tensors else spec


def _head(tensors: Tensors, tied: bool) -> Head:
    if "lm_head.weight" not in tensors:
        return "absent"
    return "tied" if tied else "separate"


def _gpt2(tensors: Tensors, options: _Options) -> PermutationSpec:
    prefix = "" if "wte.weight" in tensors else "transformer."
    head = _head(tensors, options.flag("tie_word_embeddings", default=True))
    layers = _count(tensors, rf"{re.escape(prefix)}h\.(\d+)\.")
    width = tensors[f"{prefix}wte.weight"].shape[1]
    spec = gpt2(layers, options.number("num_heads", "n_head"), width, head=head)
    if prefix:
        return spec
    return spec.renamed({name: name.removeprefix("transformer.") for name in spec.layouts})


def _llama(tensors: Tensors, options: _Options) -> PermutationSpec:
    heads = options.number("num_heads", "num_attention_heads")
    query = "model.layers.0.self_attn.q_proj"
    return llama(
        _count(tensors, r"model\.layers\.(\d+)\."),
        heads,
        options.number("num_kv_heads", "num_key_value_heads", default=heads),
        options.number("head_width", "head_dim", default=tensors[f"{query}.weight"].shape[0] // heads),
        qkv_bias=f"{query}.bias" in tensors,
        head=_head(tensors, options.flag("tie_word_embeddings", default=False)),
    )


_FAMILIES: dict[str, Callable[[Tensors, _Options], PermutationSpec]] = {
    "bert": _bert,
    "clip_huggingface": _clip_huggingface,
    "clip_openai": _clip_openai,
    "gpt2": _gpt2,
    "llama": _llama,
    "mlp": _mlp,
    "resnet": _resnet,
    "swin": _swin,
    "vgg": _vgg,
    "vit": _vit,
    "vit_huggingface": _vit_huggingface,
}

_FAMILY_OF_MODEL_TYPE = {
    "bert": "bert",
    "clip": "clip_huggingface",
    "clip_text_model": "clip_huggingface",
    "clip_vision_model": "clip_huggingface",
    "gpt2": "gpt2",
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "llama",
    "vit": "vit_huggingface",
}

#: Patterns that together only the tensors of one family match.
_MARKS = (
    ((r"^layers\.0\.blocks\.0\.attn\.relative_position_bias_table$",), "swin"),
    ((r"^visual\.transformer\.resblocks\.0\.",), "clip_openai"),
    ((r"^(vision|text)_model\.encoder\.layers\.0\.",), "clip_huggingface"),
    ((r"^patch_embed\.proj\.weight$", r"^blocks\.0\.attn\.qkv\.weight$"), "vit"),
    ((r"^conv1\.weight$", r"^bn1\.weight$", r"^layer1\.0\.conv1\.weight$"), "resnet"),
    ((r"^features\.0\.weight$", r"^classifier\.\d+\.weight$"), "vgg"),
    ((r"^vit\.embeddings\.patch_embeddings\.projection\.weight$",), "vit_huggingface"),
    ((r"^bert\.embeddings\.word_embeddings\.weight$",), "bert"),
    ((r"^(transformer\.)?wte\.weight$", r"^(transformer\.)?h\.0\.attn\.c_attn\.weight$"), "gpt2"),
    ((r"^model\.layers\.0\.self_attn\.q_proj\.weight$", r"^model\.layers\.0\.mlp\.gate_proj\.weight$"), "llama"),
)

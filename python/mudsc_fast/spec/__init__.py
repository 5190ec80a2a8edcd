"""Specifications: which axes of a network's tensors belong together. One file per architecture family."""

from mudsc_fast.spec.bert import bert
from mudsc_fast.spec.clip import Tower, clip_huggingface, clip_openai
from mudsc_fast.spec.gpt2 import gpt2
from mudsc_fast.spec.llama import llama
from mudsc_fast.spec.mlp import mlp
from mudsc_fast.spec.permutation_spec import (
    Axis,
    Groups,
    Observation,
    PermutationSpec,
    Segment,
    TensorAxis,
    Window,
    consumes,
    produces,
)
from mudsc_fast.spec.resnet import resnet
from mudsc_fast.spec.swin import swin
from mudsc_fast.spec.vgg import vgg
from mudsc_fast.spec.vit import vit, vit_huggingface

__all__ = [
    "Axis",
    "Groups",
    "Observation",
    "PermutationSpec",
    "Segment",
    "TensorAxis",
    "Tower",
    "Window",
    "bert",
    "clip_huggingface",
    "clip_openai",
    "consumes",
    "gpt2",
    "llama",
    "mlp",
    "produces",
    "resnet",
    "swin",
    "vgg",
    "vit",
    "vit_huggingface",
]

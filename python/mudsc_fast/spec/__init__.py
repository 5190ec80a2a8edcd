"""Permutation specifications: which axes of a network's tensors belong together.

`permutation_spec` defines them and `axes`, `groups` and `observation` their parts; `families` has one builder per
architecture family; `infer` derives a specification from a model.
"""

from mudsc_fast.spec.axes import Axis, Segment, TensorAxis, Window, consumes, produces
from mudsc_fast.spec.families.bert import bert
from mudsc_fast.spec.families.clip import Tower, clip_huggingface, clip_openai
from mudsc_fast.spec.families.gpt2 import gpt2
from mudsc_fast.spec.families.llama import llama
from mudsc_fast.spec.families.mlp import mlp
from mudsc_fast.spec.families.resnet import resnet
from mudsc_fast.spec.families.swin import swin
from mudsc_fast.spec.families.vgg import vgg
from mudsc_fast.spec.families.vit import vit, vit_huggingface
from mudsc_fast.spec.groups import Groups
from mudsc_fast.spec.observation import Observation
from mudsc_fast.spec.permutation_spec import PermutationSpec

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

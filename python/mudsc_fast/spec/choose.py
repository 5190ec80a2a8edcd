"""Choose the spec of a network: a given one, that of a family, one from a file, or one derived from the model."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mudsc_fast._forward import inputs_of, preserve_training_mode, run_on_batch
from mudsc_fast._huggingface import build_without_weights, quiet_transformers, random_inputs
from mudsc_fast.spec.permutation_spec import PermutationSpec
from mudsc_fast.spec.recognize import build_family, family_names, family_of_config, family_of_names, listed

#: What a user may pass as `spec`.
SpecLike = PermutationSpec | str | os.PathLike[str] | None


def choose_spec(
    spec: SpecLike,
    tensors: Mapping[str, Tensor],
    *,
    config: Mapping[str, Any] | None = None,
    model: Callable[[], nn.Module] | None = None,
    batch: Callable[[], Any] | None = None,
    verify: Callable[[PermutationSpec], bool] | None = None,
) -> PermutationSpec:
    """Return the spec of a network.

    Parameters
    ----------
    spec
        One of:

        - a :class:`PermutationSpec`, which is returned;
        - the path of a ``.json`` file of :meth:`PermutationSpec.save`;
        - the name of a family, with the numbers that tensor shapes do not determine: ``"resnet"``,
          ``"vit:num_heads=12"``;
        - ``"derive"``: derive the spec from what the model computes;
        - None: use the family recognized by the configuration or the tensor names. If there is none, or the network is
          a variant of it, derive the spec.
    tensors
        The tensors of the network by name.
    config
        The entries of its configuration, if it is a Hugging Face model.
    model
        Returns the model, to derive a spec from. Not needed if `config` names a class of transformers.
    batch
        Returns a batch that the model can run on. Not needed for Hugging Face models that take tokens or pixels.
    verify
        Returns whether the model's outputs confirm a spec. Called if a family is recognized by tensor names alone. If
        the result is False, the spec is derived.

    Raises
    ------
    TypeError
        If `spec` is of another type.
    ValueError
        If the network is not recognized and no spec can be derived, a number is missing, the file cannot be read, or
        the spec does not fit the tensors. The message says what to pass.
    """
    if isinstance(spec, PermutationSpec):
        return spec
    if spec is not None and not isinstance(spec, (str, os.PathLike)):
        raise TypeError(
            "spec must be a PermutationSpec, the name of a family, the path of a .json file or None, got "
            f"{type(spec).__name__}"
            + (": pass PermutationSpec(spec) for a dict of axes" if isinstance(spec, Mapping) else "")
        )
    if isinstance(spec, os.PathLike) or (spec is not None and spec.endswith(".json")):
        return _load(Path(spec), tensors)
    source = _Source(tensors, config or {}, model, batch, verify)
    if spec == "derive":
        return source.derive()
    if spec is not None:
        name, _, rest = spec.partition(":")
        return build_family(name, _numbers(spec, rest), tensors, config or {})
    return _recognize(source)


class _Source:
    """The tensors and configuration of a network and, if available, the model and a batch."""

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        config: Mapping[str, Any],
        model: Callable[[], nn.Module] | None,
        batch: Callable[[], Any] | None,
        verify: Callable[[PermutationSpec], bool] | None = None,
    ) -> None:
        self.tensors, self.config, self.model, self.batch, self.verify = tensors, config, model, batch, verify

    @property
    def can_derive(self) -> bool:
        """Whether there is a model and an input for it."""
        return bool(self.config) if self.batch is None else bool(self.config) or self.model is not None

    def derive(self) -> PermutationSpec:
        """Return the spec derived from what the model computes."""
        if not self.can_derive:
            raise ValueError(
                "spec='derive' needs the model and a batch to run it on, or a Hugging Face model: "
                + ("got no model" if self.model is None else "got no data")
            )
        model = build_without_weights(self.config) if self.model is None else self.model()
        inputs = random_inputs(model) if self.batch is None or self.model is None else inputs_of(self.batch())
        if isinstance(inputs, dict) and not inputs:
            raise ValueError(f"deriving the spec of {type(model).__name__} needs a batch: pass data, or a spec")
        with quiet_transformers():
            return _derived(model, inputs, self.tensors)


def _recognize(source: _Source) -> PermutationSpec:
    """Return the spec of the family recognized by the configuration or the tensor names, or else derive it."""
    family = family_of_config(source.config) if source.config else family_of_names(source.tensors)
    if family == "mlp" and source.model is not None:
        return _of_chain(source, source.model())
    if family is None:
        if source.can_derive:
            return source.derive()
        if not source.tensors:
            raise ValueError("models must have tensors, got none")
        shown = ", ".join(list(source.tensors)[:5])
        raise ValueError(
            f"no family is recognized by the tensor names ({shown}, ...). Pass data and the models as modules: the "
            f"spec is derived. Or pass spec: a PermutationSpec, the path of a .json file, or a family: {family_names()}"
        )
    try:
        chosen = build_family(family, {}, source.tensors, source.config)
        # Names and shapes fit, but they do not tell how the layers are connected.
        if source.config or source.verify is None or not source.can_derive or source.verify(chosen):
            return chosen
        raise ValueError(f"the tensors have the names of the family {family!r}, but the model computes something else")
    except ValueError as error:
        if not source.can_derive:
            raise
        try:
            return source.derive()
        except ValueError as second:
            if str(second) == str(error):  # of the data, which both use
                raise
            raise ValueError(f"{error}\n  deriving the spec instead failed: {second}") from second


def _of_chain(source: _Source, model: nn.Module) -> PermutationSpec:
    """Return the spec of a model that has only linear layers.

    Their names do not tell what happens between them (a residual connection, a softmax), so the spec is derived. If
    there is no batch, an input of the first layer's size is made up.
    """
    if source.batch is not None:
        return source.derive()
    first = next(tensor for name, tensor in source.tensors.items() if name.endswith("weight"))
    inputs = torch.zeros(1, first.shape[1], dtype=first.dtype, device=first.device)
    try:
        return _derived(model, inputs, source.tensors)
    except ValueError as error:
        raise ValueError(
            f"{error}. The model has only linear layers: if each feeds the next, pass spec='mlp', else pass data"
        ) from error


def _derived(model: nn.Module, inputs: Any, tensors: Mapping[str, Tensor]) -> PermutationSpec:
    """Derive the spec of a model, without tensors that are missing in the files."""
    known = set(model.state_dict())
    unknown = [name for name in tensors if name not in known]
    if unknown:
        raise ValueError(
            f"{type(model).__name__} has no {unknown[0]!r} ({len(unknown)} of the {len(tensors)} tensors in the files "
            "are unknown to it): it is another architecture or has other names in memory; write the spec as a .json "
            "file"
        )
    with preserve_training_mode(model):
        try:
            spec = PermutationSpec.from_model(model.eval(), inputs)
        except (ValueError, TypeError, AttributeError) as error:
            _check_runs(model, inputs)
            raise ValueError(f"the spec of {type(model).__name__} cannot be derived: {error}") from error
    # Files may lack tied tensors and optional layers such as poolers.
    spec = spec.without({name for name in spec.layouts if name not in tensors})
    problems = spec.problems(tensors)
    if problems:
        raise ValueError(f"the derived spec does not fit the tensors: {listed(problems)}")
    return spec


def _check_runs(model: nn.Module, inputs: Any) -> None:
    """Raise an error if a model cannot run on the inputs that its spec would be derived with."""
    if any(parameter.is_meta for parameter in model.parameters()):
        return
    with torch.no_grad():
        run_on_batch(model, inputs, 0, next(iter(model.state_dict().values())).device, None)


def _load(path: Path, tensors: Mapping[str, Tensor]) -> PermutationSpec:
    try:
        spec = PermutationSpec.load(path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from error
    problems = spec.problems(tensors)
    if problems:
        raise ValueError(f"{path} does not fit the tensors: {listed(problems)}")
    return spec


def _numbers(text: str, rest: str) -> dict[str, int]:
    numbers = {}
    for entry in filter(None, rest.split(",")):
        name, _, value = entry.partition("=")
        try:
            numbers[name.strip()] = int(value)
        except ValueError:
            raise ValueError(f"spec must be NAME:number=value,..., got {entry!r} in {text!r}") from None
    return numbers

"""The arguments of the command and its help."""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path
from typing import Any, NoReturn, get_args

import mudsc_fast
from mudsc_fast.command import completion, subcommands
from mudsc_fast.command.installation import info
from mudsc_fast.command.terminal import label
from mudsc_fast.matching.node import Mode
from mudsc_fast.ops.correlation import Precision
from mudsc_fast.options import Space

_EXAMPLES = """\
examples:
  Merge two Hugging Face directories by their weights:
    mudsc-fast merge bert-a bert-b --output merged

  Merge two classifiers with different labels; each keeps its classifier:
    mudsc-fast merge cats dogs --output merged --task-heads auto

  Match by weights and activations, with batches from my_data.py:
    mudsc-fast merge a.pt b.pt --output merged.pt --model my_data:make_model --data my_data:batches

  See what would be matched before merging:
    mudsc-fast merge bert-a bert-b --output merged --dry-run

  Merge in eight processes:
    torchrun --nproc-per-node 8 -m mudsc_fast merge llama-a llama-b --output merged
"""

_MERGE = """\
Merge networks of one architecture into a new one of the same size, without training. Units are matched first, by their
weights and, with --data, by their activations. Then the weights are averaged. A network is a .safetensors file, a
torch.save file with a state dict (.pt, .pth, .bin, .ckpt), or a Hugging Face directory.
"""

_MERGE_EXAMPLES = _EXAMPLES

_ALIGN = """\
Write a network with its units in the order of another network. Its outputs do not change, and any tool can then average
it with BASE, tensor by tensor.
"""

_ALIGN_EXAMPLES = """\
examples:
  mudsc-fast align base other --output other-aligned
  mudsc-fast align a.pt b.pt --output b-aligned.pt --spec vit:num_heads=12
"""

_INSPECT = """\
Show the tensors of a network in files, its family, the nodes of its spec, and which axes keep their order and why.
"""

_INSPECT_EXAMPLES = """\
examples:
  mudsc-fast inspect bert-a
  mudsc-fast inspect weights.safetensors --spec vit:num_heads=12
"""

_COMPLETION_EXAMPLES = """\
examples:
  bash:  mudsc-fast completion bash > ~/.local/share/bash-completion/completions/mudsc-fast
  zsh:   mudsc-fast completion zsh > "${fpath[1]}/_mudsc-fast"
  fish:  mudsc-fast completion fish > ~/.config/fish/completions/mudsc-fast.fish
"""


class _Parser(argparse.ArgumentParser):
    """Shows errors in one line that names the subcommand, without the fifteen lines of its usage."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Parse the arguments, and refuse unknown ones here, where the subcommand is known."""
        given, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return given, unknown

    def error(self, message: str) -> NoReturn:
        """Show an error in the form of all errors of the command, and exit."""
        self.exit(2, f"{self.prog}: {label('error')} {message} ({self.prog} --help shows the options)\n")


class _TwoOrMore(argparse.Action):
    """Refuses a single network before anything is imported or read."""

    def __call__(self, parser: Any, namespace: Any, values: Any, _option: str | None = None) -> None:
        if len(values) < 2:
            parser.error(f"expected two or more networks to merge, got {len(values)}: {', '.join(values)}")
        setattr(namespace, self.dest, values)


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Wraps the description, but not the examples."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith("examples:"):
            return super()._fill_text(text, width, indent)
        return textwrap.fill(" ".join(text.split()), width, initial_indent=indent, subsequent_indent=indent)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command; the function that runs a subcommand is its default ``run``."""
    parser = _Parser(
        prog="mudsc-fast",
        description="Merge pretrained networks without training.",
        epilog=_EXAMPLES,
        formatter_class=_Formatter,
    )
    parser.add_argument("--version", action="version", version=f"mudsc_fast {mudsc_fast.__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    _merge_arguments(_add(subparsers, "merge", "Merge networks into a new one.", _MERGE, _MERGE_EXAMPLES))
    _align_arguments(
        _add(subparsers, "align", "Put the units of a network in the order of another.", _ALIGN, _ALIGN_EXAMPLES)
    )
    _inspect_arguments(
        _add(subparsers, "inspect", "Show the tensors and the spec of a network.", _INSPECT, _INSPECT_EXAMPLES)
    )
    about = "Show versions, devices and the kernel that each op uses."
    _add(subparsers, "info", about, about, None).set_defaults(run=lambda _: info())
    about = "Print a script that completes the command in a shell."
    shells = _add(subparsers, "completion", about, about, _COMPLETION_EXAMPLES)
    shells.add_argument("shell", choices=completion.SHELLS, help="The shell.")
    shells.set_defaults(run=lambda given: completion.script(build_parser(), given.shell))
    return parser


def _add(subparsers: Any, name: str, about: str, description: str, examples: str | None) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        name, help=about, description=description, epilog=examples, formatter_class=_Formatter
    )
    return parser


def _merge_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=subcommands.merge)
    parser.add_argument(
        "inputs", nargs="+", action=_TwoOrMore, metavar="NETWORK", help="A file or directory. Give two or more."
    )
    output = _output_arguments(parser)
    output.add_argument(
        "--dtype",
        choices=subcommands.DTYPES,
        help="Dtype of floating point tensors in the output. By default they keep theirs.",
    )
    matching = _matching_arguments(parser)
    matching.add_argument(
        "--mode",
        choices=get_args(Mode),
        default="align",
        help="How to match: 'align' permutes the units of each network, 'zip' clusters the units of all networks. "
        "Default: %(default)s.",
    )
    matching.add_argument(
        "--weights", metavar="W,W,...", help="The share of each network, e.g. 0.7,0.3. Default: equal."
    )
    matching.add_argument(
        "--shrink",
        type=float,
        help="With --mode zip: how much the similarities of a cluster shrink as it grows. "
        "Default: 0.5 for two networks, 1 for more.",
    )
    matching.add_argument(
        "--budget",
        type=float,
        default=1.0,
        help="With --mode zip: the share of merges that may be within one network. Default: %(default)s.",
    )
    _tensor_arguments(parser)
    _search_arguments(parser)
    _run_arguments(parser)
    messages = _message_arguments(parser)
    messages.add_argument(
        "--dry-run",
        action="store_true",
        help="Show what would be matched and the estimated memory and time. Write nothing.",
    )


def _align_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=subcommands.align)
    parser.add_argument("base", metavar="BASE", help="The file or directory whose order of units is kept.")
    parser.add_argument("other", metavar="OTHER", help="The file or directory to write in that order.")
    _output_arguments(parser)
    _matching_arguments(parser)
    _tensor_arguments(parser)
    _search_arguments(parser)
    messages = _message_arguments(parser)
    messages.add_argument(
        "--no-check", action="store_true", help="Do not compare the outputs of OTHER before and after."
    )


def _inspect_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=subcommands.inspect)
    parser.add_argument("path", metavar="PATH", help="The file or directory of a network.")
    parser.add_argument("--tensors", action="store_true", help="List all tensors with their shapes, dtypes and nodes.")
    _add_spec(parser)
    _add_model_and_data(parser)
    parser.add_argument("--debug", action="store_true", help="Show the traceback of an error.")


def _output_arguments(parser: argparse.ArgumentParser) -> Any:
    group = parser.add_argument_group("output")
    group.add_argument(
        "--output",
        required=True,
        metavar="PATH",
        help="A new file if the name ends in .safetensors, .pt, .pth, .bin or .ckpt, else a new directory.",
    )
    group.add_argument(
        "--format",
        choices=("safetensors", "torch"),
        help="Format of the files of a directory. Default: that of the first network.",
    )
    group.add_argument(
        "--shard-size", metavar="SIZE", help="Maximum size of a file of a directory, e.g. 200MB. Default: 5GB."
    )
    group.add_argument("--report", type=Path, metavar="FILE", help="Write a report as JSON.")
    return group


def _matching_arguments(parser: argparse.ArgumentParser) -> Any:
    group = parser.add_argument_group("matching")
    _add_spec(group)
    group.add_argument(
        "--space",
        choices=get_args(Space),
        help="What to compare: weights, activations, or both. Default: dual with --data, else weight.",
    )
    group.add_argument(
        "--balance",
        type=float,
        metavar="SHARE",
        help="The share of the weights in the dual space, from 0 to 1. Default: 0.5.",
    )
    _add_model_and_data(group)
    group.add_argument(
        "--no-verify",
        action="store_true",
        help="Do not check on the first batch of --data that permuting units by the given --spec keeps the outputs of "
        "the model.",
    )
    return group


def _add_spec(group: Any) -> None:
    group.add_argument(
        "--spec",
        default="auto",
        metavar="SPEC",
        help="Which units correspond: 'auto' (by config.json, by the names of the tensors, or derived), 'derive' (from "
        "what the model computes), a family such as 'vit:num_heads=12', or a .json file of PermutationSpec.save. "
        "Default: %(default)s.",
    )


def _add_model_and_data(group: Any) -> None:
    group.add_argument(
        "--data", metavar="MODULE:FUNCTION", help="A function that returns or yields batches to run the networks on."
    )
    group.add_argument(
        "--model",
        metavar="MODULE:FUNCTION",
        help="A function that builds the model. Hugging Face directories do not need it.",
    )


def _tensor_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("tensors that differ between the networks")
    group.add_argument(
        "--task-heads",
        default="",
        metavar="NAME,...",
        help="Layers that each network keeps: names, patterns, or 'auto' for all that differ. The output of a merge "
        "then has one folder for each network. All other weights are the same in all folders.",
    )
    group.add_argument(
        "--ignore",
        action="append",
        default=[],
        metavar="PATTERN",
        help="Tensors that are not merged, e.g. 'pooler.*'. The output has those of the first network. Repeatable.",
    )
    group.add_argument(
        "--dequantize",
        action="store_true",
        help="Multiply float8 and int8 weights by their scales. By default quantized weights are an error.",
    )


def _search_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("search and precision")
    group.add_argument(
        "--random-state", type=int, default=0, metavar="SEED", help="Seed of the order of nodes. Default: %(default)s."
    )
    group.add_argument(
        "--max-sweeps", type=int, default=100, metavar="N", help="Maximum number of sweeps. Default: %(default)s."
    )
    group.add_argument(
        "--patience",
        type=int,
        default=5,
        metavar="N",
        help="Sweeps without improvement before stopping. Default: %(default)s.",
    )
    group.add_argument(
        "--precision",
        choices=get_args(Precision),
        default="float32",
        help="Precision of the products that compare units. Default: %(default)s.",
    )


def _run_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("long runs")
    group.add_argument(
        "--device",
        default="cpu",
        help="Where to compare and match: 'cpu', or 'cuda', with torchrun a GPU for each process. "
        "Default: %(default)s.",
    )
    group.add_argument(
        "--checkpoint",
        type=Path,
        metavar="DIR",
        help="Save the state in this directory after every step. If the run is interrupted, the same command continues "
        "from there, also with another number of processes.",
    )
    group.add_argument(
        "--timeout",
        type=float,
        metavar="SECONDS",
        help="With torchrun: seconds after which a process that does not respond counts as failed. Default: 1800.",
    )


def _message_arguments(parser: argparse.ArgumentParser) -> Any:
    group = parser.add_argument_group("messages")
    group.add_argument("--quiet", action="store_true", help="Show nothing but errors.")
    group.add_argument("--debug", action="store_true", help="Show the traceback of an error.")
    return group

"""Completion of the command in shells, generated from its parser."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

SHELLS = ("bash", "zsh", "fish")


@dataclass(frozen=True)
class _Option:
    """One option of a subcommand: its names, the values to choose from, whether it takes one, and its help."""

    names: tuple[str, ...]
    choices: tuple[str, ...]
    takes_value: bool
    help: str


@dataclass(frozen=True)
class _Command:
    name: str
    help: str
    options: tuple[_Option, ...]
    choices: tuple[str, ...]


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """Return a script that completes subcommands, options, their values and file names in a shell.

    Parameters
    ----------
    parser
        The parser of the command.
    shell
        ``"bash"``, ``"zsh"`` or ``"fish"``.
    """
    commands = list(_commands(parser))
    return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](parser.prog, commands)


def _commands(parser: argparse.ArgumentParser) -> Iterator[_Command]:
    # argparse has no public way to read a parser; these attributes are the ones that argcomplete and shtab read.
    subparsers = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    helps = {action.dest: action.help or "" for action in subparsers._choices_actions}
    for name, subparser in subparsers.choices.items():
        options = tuple(
            _Option(
                tuple(action.option_strings),
                tuple(map(str, action.choices or ())),
                action.nargs != 0,
                _first_sentence(action.help or ""),
            )
            for action in subparser._actions
            if action.option_strings
        )
        positional = next((action for action in subparser._actions if not action.option_strings), None)
        choices = tuple(map(str, positional.choices)) if positional is not None and positional.choices else ()
        yield _Command(name, helps.get(name, ""), options, choices)


def _first_sentence(text: str) -> str:
    return text.partition(". ")[0].rstrip(".").replace("%(default)s", "")


def _function_name(prog: str) -> str:
    return "_" + prog.replace("-", "_")


def _bash(prog: str, commands: list[_Command]) -> str:
    cases = []
    for command in commands:
        names = " ".join(name for option in command.options for name in option.names)
        values = [
            f"          {'|'.join(option.names)}) COMPREPLY=($(compgen -W {shlex.quote(' '.join(option.choices))} "
            '-- "$current")); return ;;'
            for option in command.options
            if option.choices
        ]
        words = shlex.quote(" ".join(command.choices))
        files = f'COMPREPLY=($(compgen -W {words} -- "$current"))' if command.choices else "COMPREPLY=()"
        cases += [
            f"    {command.name})",
            '        case "$previous" in',
            *values,
            "        esac",
            '        if [[ "$current" == -* ]]; then',
            f'          COMPREPLY=($(compgen -W {shlex.quote(names)} -- "$current"))',
            "        else",
            f"          {files}",
            "        fi ;;",
        ]
    function = _function_name(prog)
    subcommands = " ".join(command.name for command in commands)
    return "\n".join(
        [
            f"# bash completion of {prog}",
            f"{function}() {{",
            '  local current="${COMP_WORDS[COMP_CWORD]}" previous="${COMP_WORDS[COMP_CWORD-1]}"',
            "  if [[ $COMP_CWORD -eq 1 ]]; then",
            f'    COMPREPLY=($(compgen -W "{subcommands}" -- "$current"))',
            "    return",
            "  fi",
            '  case "${COMP_WORDS[1]}" in',
            *cases,
            "  esac",
            "}",
            # If there are no other choices, file names are completed.
            f"complete -o default -F {function} {prog}",
        ]
    )


def _zsh(prog: str, commands: list[_Command]) -> str:
    def quoted(text: str) -> str:
        return text.replace("'", "'\\''").replace("[", "\\[").replace("]", "\\]").replace(":", "\\:")

    cases = []
    for command in commands:
        lines = []
        for option in command.options:
            value = f":value:({' '.join(option.choices)})" if option.choices else ":value:_files"
            about = f"[{quoted(option.help)}]{value if option.takes_value else ''}"
            lines += [f"        '{name}{about}'" for name in option.names]
        positional = f"({' '.join(command.choices)})" if command.choices else "_files"
        lines.append(f"        '*:network:{positional}'")
        cases += [f"    {command.name})", "      _arguments \\", " \\\n".join(lines), "      ;;"]
    described = [f"    '{command.name}:{quoted(command.help)}'" for command in commands]
    function = _function_name(prog)
    return "\n".join(
        [
            f"#compdef {prog}",
            f"{function}() {{",
            "  local -a subcommands",
            "  subcommands=(",
            *described,
            "  )",
            "  if (( CURRENT == 2 )); then",
            "    _describe command subcommands",
            "    return",
            "  fi",
            "  local subcommand=$words[2]",
            "  shift words",
            "  (( CURRENT-- ))",
            "  case $subcommand in",
            *cases,
            "  esac",
            "}",
            f'{function} "$@"',
        ]
    )


def _fish(prog: str, commands: list[_Command]) -> str:
    lines = [f"# fish completion of {prog}"]
    for command in commands:
        about = shlex.quote(command.help)
        lines.append(f"complete -c {prog} -f -n __fish_use_subcommand -a {command.name} -d {about}")
    for command in commands:
        condition = shlex.quote(f"__fish_seen_subcommand_from {command.name}")
        for option in command.options:
            names = " ".join(f"-l {n[2:]}" if n.startswith("--") else f"-s {n[1:]}" for n in option.names)
            value = ""
            if option.choices:
                value = f" -x -a {shlex.quote(' '.join(option.choices))}"
            elif option.takes_value:
                value = " -r"
            lines.append(f"complete -c {prog} -n {condition} {names}{value} -d {shlex.quote(option.help)}")
        if command.choices:
            lines.append(f"complete -c {prog} -f -n {condition} -a {shlex.quote(' '.join(command.choices))}")
    return "\n".join(lines)

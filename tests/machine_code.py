"""Reads the machine code of CUDA kernels from the output of cuobjdump."""

from __future__ import annotations

import re
from typing import NamedTuple


class Instruction(NamedTuple):
    """An instruction: address, predicate (such as "@!P0", or ""), and text without the predicate."""

    address: int
    predicate: str
    text: str

    @property
    def name(self) -> str:
        """The operation with its modifiers, such as "LDS.128"."""
        return self.text.split()[0]


def parse(code: str) -> list[Instruction]:
    """Return the instructions of one kernel."""
    found = re.findall(r"/\*([0-9a-f]{4,6})\*/\s+(@!?U?P\w+ )?(.*?)\s*;", code)
    return [Instruction(int(address, 16), predicate.strip(), text) for address, predicate, text in found]


def main_loop(instructions: list[Instruction], marker: str, preferred: str = r"LDGSTS\S*\.128") -> list[Instruction]:
    """Return one iteration of the smallest loop with all instructions named `marker`, along its common path.

    Of all paths through the loop it is the one with the most `preferred` instructions (a pattern of their names; by
    default copies of 16 bytes) and, of these, the one with the fewest instructions: a slab inside the samples, without
    sums beside its product and without NaN. Loops inside are counted once.
    """
    marked = [at for at, one in enumerate(instructions) if one.name.startswith(marker)]
    places = {one.address: at for at, one in enumerate(instructions)}
    targets = {at: places.get(_target(one), -1) for at, one in enumerate(instructions) if one.name.startswith("BRA")}
    begin, end = min(
        ((to, at) for at, to in targets.items() if 0 <= to <= marked[0] and at > marked[-1]),
        key=lambda loop: loop[1] - loop[0],
    )
    # For each instruction: minus the number of preferred ones up to the end, the number of all, and the next one.
    best: dict[int, tuple[int, int, int]] = {end: (0, 1, -1)}
    for at in range(end - 1, begin - 1, -1):
        one = instructions[at]
        following = [targets[at]] if at < targets.get(at, -1) <= end else []
        is_jump = one.name.startswith(("EXIT", "RET", "BRX", "BRA"))
        if not is_jump or one.predicate or re.match(r"BRA\S* !?U?P", one.text):
            following.append(at + 1)
        ways = [(*best[place][:2], place) for place in following if place in best]
        if ways:
            preference, count, place = min(ways)
            best[at] = (preference - bool(re.match(preferred, one.name)), count + 1, place)
    path = []
    place = begin
    while place != -1:
        path.append(instructions[place])
        place = best[place][2]
    return path


def _target(one: Instruction) -> int:
    """Return the target address of a branch, or -1 if the text has none."""
    found = re.search(r"0x([0-9a-f]+)$", one.text)
    return int(found[1], 16) if found else -1

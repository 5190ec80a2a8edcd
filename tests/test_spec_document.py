from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mudsc_fast.spec import (
    Axis,
    Groups,
    Observation,
    PermutationSpec,
    Tower,
    Window,
    bert,
    clip_openai,
    consumes,
    gpt2,
    llama,
    resnet,
    swin,
    vgg,
    vit,
)

SPEC = PermutationSpec(
    {
        "qkv.weight": ([Window("qk", 8), Window(consumes("v", inner=2), 12), Window(None, 4)], "stream"),
        "table.weight": (None, Axis("stream", "produce", compared=False)),
        "out.weight": ("stream", "v"),
    },
    observe={"qk": [Observation("qkv", "output", -1, 0, 8), Observation("qkv", "output", -1, 8, 8)]},
    groups={"qk": Groups(2, "heads"), "v": Groups(2, "heads")},
)

BUILT = {
    "resnet": resnet((2, 2), norm_groups=4),
    "vgg": vgg((1, 2)),
    "vit": vit(2, 3, 24),
    "swin": swin((1, 2), (2, 4), 16),
    "clip": clip_openai(Tower(2, 3, 24), Tower(2, 4, 32)),
    "gpt2": gpt2(2, 4, 32),
    "llama": llama(2, 8, 4, 4),
    "bert": bert(2, 4),
}


def test_document_is_readable() -> None:
    assert SPEC.to_json().splitlines() == [
        "{",
        '  "format": "mudsc_fast.PermutationSpec",',
        '  "version": 1,',
        '  "tensors": {',
        '    "qkv.weight": [[{"width": 8, "axis": "qk"}, {"width": 12, "axis": {"node": "v", "role": "consume", '
        '"inner": 2}}, {"width": 4, "axis": null}], "stream"],',
        '    "table.weight": [null, {"node": "stream", "role": "produce", "compared": false}],',
        '    "out.weight": ["stream", "v"]',
        "  },",
        '  "groups": {',
        '    "qk": {"count": 2, "tie": "heads"},',
        '    "v": {"count": 2, "tie": "heads"}',
        "  },",
        '  "observe": {',
        '    "qk": [{"module": "qkv", "port": "output", "position": -1, "width": 8}, {"module": "qkv", '
        '"port": "output", "position": -1, "start": 8, "width": 8}],',
        '    "v": [{"module": "out"}],',
        '    "stream": [{"module": "qkv"}]',
        "  }",
        "}",
    ]


@pytest.mark.parametrize("name", BUILT)
def test_spec_round_trip(name: str) -> None:
    spec = BUILT[name]
    assert PermutationSpec.from_json(spec.to_json()) == spec
    assert PermutationSpec.from_json(spec.to_json()).bundles == spec.bundles


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "spec.json"
    path.write_text("what was there")
    SPEC.save(path)
    assert PermutationSpec.load(path) == PermutationSpec.load(str(path)) == SPEC
    assert [entry.name for entry in tmp_path.iterdir()] == ["spec.json"]


def test_failed_write_keeps_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, text: str, encoding: str) -> int:
        path.write_bytes(text.encode(encoding)[:9])
        raise OSError("No space left on device")

    path = tmp_path / "spec.json"
    path.write_text("what was there")
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        SPEC.save(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["spec.json"]
    assert path.read_text() == "what was there"


def test_errors_name_file(tmp_path: Path) -> None:
    path = tmp_path / "spec.json"
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"spec.json: specification must be an object, got \[\]"):
        PermutationSpec.load(path)


def changed(**parts: Any) -> dict[str, Any]:
    return {
        "format": "mudsc_fast.PermutationSpec",
        "version": 1,
        "tensors": {"w": ["a", None], "v": [None, "a"]},
        **parts,
    }


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (changed(format="other"), "format must be 'mudsc_fast.PermutationSpec', got 'other'"),
        (changed(version=2), "version must be 1, got 2"),
        (changed(version=True), "version must be 1, got True"),
        (changed(tensors=[]), r"tensors must be an object, got \[\]"),
        (changed(tensors={"w": "a"}), r"tensors\['w'\] must be a list, got \"a\""),
        (changed(tensors={"w": [3]}), r"tensors\['w'\]\[0\] must be the name of a node, an object or null, got 3"),
        (changed(tensors={"w": [[]]}), r"tensors\['w'\]\[0\] must have at least one window, got none"),
        (changed(tensors={"w": [["a"]]}), r"tensors\['w'\]\[0\]\[0\] must be an object, got \"a\""),
        (
            changed(tensors={"w": [[{"axis": "a"}]]}),
            r"tensors\['w'\]\[0\]\[0\] must have the field 'width', got \['axis'\]",
        ),
        (
            changed(tensors={"w": [[{"axis": "a", "width": 0}]]}),
            r"tensors\['w'\]\[0\]\[0\]: width of a window must be at least 1, got 0",
        ),
        (
            changed(tensors={"w": [[{"axis": "a", "width": True}]]}),
            r"tensors\['w'\]\[0\]\[0\].width must be an integer, got true",
        ),
        (
            changed(tensors={"w": [{"node": "a", "role": "make"}]}),
            r"tensors\['w'\]\[0\]: role of node 'a' must be 'produce' or 'consume', got 'make'",
        ),
        (changed(tensors={"w": [{"role": "produce"}]}), r"tensors\['w'\]\[0\] must have the field 'node'"),
        (
            changed(tensors={"w": [{"node": "a", "role": "produce", "inner": "2"}]}),
            r"tensors\['w'\]\[0\].inner must be an integer, got \"2\"",
        ),
        (
            changed(tensors={"w": [{"node": "a", "role": "produce", "compared": 0}]}),
            r"tensors\['w'\]\[0\].compared must be true or false, got 0",
        ),
        (changed(groups={"a": 2}), r"groups\['a'\] must be an object, got 2"),
        (changed(groups={"a": {"count": None}}), r"groups\['a'\].count must be an integer, got null"),
        (changed(groups={"z": {"count": 2}}), "groups names the node 'z', which no axis has"),
        (changed(observe={"a": {}}), r"observe\['a'\] must be a list, got {}"),
        (
            changed(observe={"a": [{"module": "v", "port": "side"}]}),
            r"observe\['a'\]\[0\]: port of the observation of 'v' must be .* got 'side'",
        ),
        (
            changed(observe={"a": [{"module": "v", "axis": 1}]}),
            r"observe\['a'\]\[0\] must have no fields other than module, .* got 'axis'",
        ),
        (changed(extra=1), "specification must have no fields other than format, version, .* got 'extra'"),
        ({"format": "mudsc_fast.PermutationSpec", "version": 1}, "specification must have the field 'tensors'"),
    ],
)
def test_bad_documents(document: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PermutationSpec.from_json(json.dumps(document))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "specification must be JSON, got an error at line 1"),
        ('{"format": 1, "format": 2}', "every field must occur only once, got 'format' twice"),
    ],
)
def test_invalid_json(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PermutationSpec.from_json(text)

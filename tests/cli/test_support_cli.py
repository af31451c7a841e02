"""The committed support matrix, and what `mmicl support` says of it."""

import json

import pytest
from transformers import __version__

from mmicl_kernels.cli import main
from mmicl_kernels.cli.support import CELLS, MATRIX, METHODS, green, letters_of, markdown, newest_first
from mmicl_kernels.testing.tiny_models import ALL_MODELS, is_available


@pytest.fixture(scope="module")
def matrix():
    return json.loads(MATRIX.read_text())


def test_every_cell_was_run(matrix):
    for version, families in matrix.items():
        for name, family in families.items():
            assert set(family["cells"]) == set(METHODS), (version, name)
            assert all(set(cells) == set(CELLS.values()) for cells in family["cells"].values()), (
                version,
                name,
            )
    assert set(matrix[newest_first(matrix)[0]]) == set(ALL_MODELS)
    assert set(matrix[__version__]) == set(filter(is_available, ALL_MODELS))


def test_enough_families_are_green(matrix):
    assert [version[:5] for version in sorted(matrix)] == ["5.17.", "5.23."]
    for version, at_least in {"5.17.0": 28, "5.23.0": 29}.items():
        assert green(matrix[version]) == len(matrix[version])
        assert len({family["class"] for family in matrix[version].values()}) >= at_least


def test_the_page_is_the_matrix(matrix):
    assert MATRIX.with_name("SUPPORT.md").read_text() == markdown(matrix)


def test_marks():
    cells = dict.fromkeys(CELLS.values(), "passed")
    assert letters_of(cells) == "FGBSPTD"
    assert letters_of({**cells, "beams": "failed", "padding": "cannot apply: why"}) == "FG!S·TD"
    assert letters_of({"forward": "passed"}) == "F??????"
    ok, empty, bad = (
        {"cells": dict.fromkeys(METHODS, {**cells, **x})} for x in ({}, {"beams": "why"}, {"beams": "failed"})
    )
    assert green({"a": ok, "b": empty, "c": bad, "d": {"cells": {"mimic": cells}}}) == 2


def test_command(capsys):
    assert main(["support"]) == 0
    out = capsys.readouterr().out
    assert "llava_next\tLlavaNextForConditionalGeneration\tFGBSPTD\tFGBSPTD\tFGBSPTD\tFGBSPTD" in out
    assert "llama4, beams: fails unpatched: counts images once for all beams" in out
    assert main(["support", "--transformers", "5.17.0"]) == 0
    assert "transformers 5.17.0: 41 of 41 models green" in capsys.readouterr().out
    assert main(["support", "--transformers", "4.0"]) == 2
    assert "'4.0', expected one of 5.17.0, 5.23.0" in capsys.readouterr().out

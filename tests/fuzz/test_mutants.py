"""The list of planted errors fits the package: whoever changes a line that one of them replaces mends the list."""

from __future__ import annotations

import random
from functools import lru_cache
from typing import Any

import mutants
import pytest

PLANTED = mutants.read_mutants()


@pytest.mark.parametrize("mutant", PLANTED, ids=lambda mutant: mutant.name)
def test_what_an_error_replaces_stands_once_in_its_file(mutant):
    text = (mutants.PACKAGE / mutant.file).read_text()
    assert text.count(mutant.old) == 1
    assert mutant.old != mutant.new and mutant.old.count("\n") == mutant.new.count("\n")
    compile(text.replace(mutant.old, mutant.new), mutant.file, "exec")


def test_there_are_sixty_errors_of_every_kind():
    assert len({mutant.name for mutant in PLANTED}) == len(PLANTED) >= 60
    assert {mutant.size for mutant in PLANTED} == set(mutants.SIZES)
    assert {kind for mutant in PLANTED for kind in mutant.kinds.split(",")} == {"ops", "others", "caches", "models"}


@lru_cache
def draw_families(size: str) -> list[dict[str, Any]]:
    op_checks = pytest.importorskip("op_checks")
    return [op_checks.draw_family(random.Random(seed), size) for seed in range(3000)]


@pytest.mark.parametrize("needs", sorted({mutant.needs for mutant in PLANTED}))
def test_families_that_run_an_error_are_drawn(needs):
    """One in 300 at least, so that the fuzzer by itself comes by them."""
    for size in {mutant.size for mutant in PLANTED if mutant.needs == needs}:
        assert sum(mutants.fits(family, needs) for family in draw_families(size)) >= 10


def test_only_the_copy_has_the_error(tmp_path):
    before = (mutants.PACKAGE / PLANTED[0].file).read_text()
    mutants.plant(PLANTED[0], tmp_path)
    planted = (tmp_path / "nsa_compile" / PLANTED[0].file).read_text()
    assert planted == before.replace(PLANTED[0].old, PLANTED[0].new) != before
    assert (mutants.PACKAGE / PLANTED[0].file).read_text() == before


def test_an_error_whose_text_is_gone_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"expected its text once in config\.py, got 0 times"):
        mutants.plant(PLANTED[0]._replace(file="config.py"), tmp_path)

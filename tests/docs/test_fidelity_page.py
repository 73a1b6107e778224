"""docs/fidelity.md has every combination, what is demanded of them, and is as tests/fixtures/fidelity.py writes it."""

from __future__ import annotations

from fidelity import GRID, PAGE, page, read_page

from kt_launch.proving.agreement import FACTOR


def test_the_page_has_every_combination_and_what_it_requires_of_them() -> None:
    results = read_page(PAGE.read_text())
    assert set(results) == set(GRID)
    for case, sides in results.items():
        far = {name: one for name, one in sides.items() if one.all_served > FACTOR * one.all_bfloat16}
        assert far == {}, case
    assert PAGE.read_text() == page({case: results[case] for case in GRID}), "make fidelity"

"""Fields of run.json: a reader refuses those of another type by name, a resumed run writes them anew."""

from __future__ import annotations

from pathlib import Path

import pytest

from kmine.errors import UserError
from kmine.store.run_info import check_info, valid_info

GOOD = {
    "class_names": ["background", "polyp"],
    "adopted_round": 1,
    "stopped_by": "rounds",
    "arm": "mean_teacher",
    "new": 1,
}


def test_good_and_unknown_fields_pass():
    check_info(GOOD, Path("run.json"))
    assert valid_info(GOOD) == GOOD


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("class_names", value) for value in ("ab", [], ["a"], ["a", 1], ["a", "\x1b[31m"], None)),
        *(("adopted_round", value) for value in (True, -1, 1000, 1.5, "1", None)),
        *(("arm", value) for value in ("../x", "/etc", "a/../..", 3)),
        *(
            ("splits", [1]),
            ("splits", {"val": "x"}),
            ("data_contents", None),
            ("versions", {"torch": 2}),
            ("intensity", "x"),
            ("peak_memory_mb", "x"),
            ("skipped", [1]),
            ("dataset", "a\nb"),
        ),
    ],
)
def test_a_field_of_another_kind_is_named_and_dropped(name, value):
    with pytest.raises(UserError, match=rf"^run\.json: expected .*`{name}`.*; restore it, or remove it"):
        check_info(GOOD | {name: value}, Path("run.json"))
    assert valid_info(GOOD | {name: value}) == {key: GOOD[key] for key in GOOD if key != name}

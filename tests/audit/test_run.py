"""audit_run as a function, and the files of an audit."""

from __future__ import annotations

import json

import pandas as pd
import pytest

import kmine
from kmine.audit import audit_run
from kmine.audit.history import COLUMNS
from kmine.errors import UserError


def test_the_table_is_that_of_audit_csv(audited_run):
    table = audit_run(audited_run, device="cpu")
    written = pd.read_csv(audited_run / "audit" / "audit.csv", dtype=str, keep_default_na=False)
    assert tuple(table.columns) == COLUMNS and kmine.audit_run is audit_run
    assert table["sample_id"].tolist() == written["sample_id"].tolist()
    assert table["suspicion"].to_numpy() == pytest.approx(written["suspicion"].astype(float).to_numpy())
    assert table["causes"].fillna("").tolist() == written["causes"].tolist()


def test_given_masks_can_be_left_out_and_another_round_chosen(audited_run):
    table = audit_run(str(audited_run), labeled=False, round_idx=1, device="cpu")
    assert set(table["kind"]) == {"pseudo"} and set(table["round"]) == {1}
    assert table["rank"].tolist() == list(range(1, len(table) + 1))
    with pytest.raises(UserError, match="expected one of 1, 2"):
        audit_run(audited_run, round_idx=3)


def test_the_page_holds_the_values_of_the_table(audited_run, rows):
    data = (audited_run / "audit" / "audit_data" / "index_0.js").read_text()
    index = json.loads(data.removeprefix('kmineAudit.take("index",0,').rstrip().removesuffix(");"))
    table = {(row["kind"], row["sample_id"]): row for row in rows(audited_run / "audit")}
    assert len(index["rows"]) == len(table) > 3 and {"area", "signal_area"} <= set(index["facts"])
    for row in index["rows"]:
        facts = dict(zip(index["facts"], row[-len(index["facts"]) :], strict=True))
        for name in ("area", "ignored", "signal_area", "signal_conflict"):
            value = table[row[1], row[0]][name]
            assert facts[name] == (pytest.approx(float(value), rel=1e-3, abs=1e-6) if value else None)

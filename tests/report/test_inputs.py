"""Input of the report: columns of results.csv keep their names."""

from __future__ import annotations

from dataclasses import fields

from kmine.report.inputs import CSV_COLUMNS, RoundRow


def test_fields_with_another_column_name_exist_and_columns_are_unique():
    names = [field.name for field in fields(RoundRow)]
    columns = [CSV_COLUMNS.get(name, name) for name in names]
    assert CSV_COLUMNS.keys() <= set(names) and len(set(columns)) == len(columns)
    assert {"num_new", "num_readmitted", "num_expelled", "changed_pixels", "taught_pixels"} <= set(columns)

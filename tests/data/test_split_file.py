"""Given splits: three formats detected by content, used unchanged, or refused in one line."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from kmine.config import DataConfig
from kmine.data.datasets.kvasir_seg import KvasirSeg
from kmine.data.split_file import read_split, resolve_splits
from kmine.data.splits import Splits
from kmine.errors import UserError
from kmine.io.files import write_csv
from kmine.ops.seeding import derive_seed
from kmine.types import SampleRef, Skipped

DATA = os.environ.get("KMINE_TEST_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="KMINE_TEST_DATA is not set to the folder that holds kvasir_seg/")
IDS = [f"s{n:02}" for n in range(20)]


def source_of(refs: list[SampleRef], *skipped: str) -> SimpleNamespace:
    left_out = tuple(Skipped(name, f"{name}.png", "damaged") for name in skipped)
    return SimpleNamespace(refs=lambda: tuple(refs), skipped=left_out)


PLAIN = [SampleRef(name, name) for name in IDS]
FAR = {name: derive_seed("hash", name) for name in IDS}
"""Hashes far from one another."""


@pytest.fixture
def put(tmp_path):
    def write(name: str, text: str | bytes) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


def lines(*names: str) -> str:
    return "".join(f"{name}\n" for name in names)


def resolved(given: str, refs=PLAIN, hashes=FAR, skipped: tuple[str, ...] = (), **settings) -> Splits:
    cfg = DataConfig(**({"label_fraction": 0.5} | settings))
    return resolve_splits(cfg, 0, refs, hashes, read_split(given, source_of(refs, *skipped)))


def refusal(given: str, refs=PLAIN) -> str:
    with pytest.raises(UserError) as caught:
        read_split(given, source_of(refs))
    return str(caught.value)


def test_without_a_setting_there_is_no_given_split():
    assert min((FAR[a] ^ FAR[b]).bit_count() for a in IDS for b in IDS if a < b) > 12
    assert read_split(None, source_of(PLAIN)) is None
    with pytest.raises(UserError, match=r"data\.split_file: expected"):
        DataConfig(split_file="")


# -- the splits of a run

HEADER = "sample_id,group_id,split\n"
OF_A_RUN = HEADER + "s00,s00,labeled\ns01,pair,unlabeled\ns02,pair,labeled\ns03,s03,val\ns04,s04,test\n"


def test_splits_of_a_run_are_used_unchanged(put):
    same = dict.fromkeys(IDS, 0)  # near-duplicates do not change the splits of a run
    found = resolved(put("splits.csv", OF_A_RUN), hashes=same, label_fraction=1, fine_groups=3)
    assert (found.labeled, found.unlabeled) == (("s00", "s02"), ("s01",))
    assert (found.val, found.test) == (("s03",), ("s04",))
    assert found.groups == {"s00": "s00", "s01": "pair", "s02": "pair", "s03": "s03", "s04": "s04"}
    again = HEADER + "".join(f"{','.join(row)}\n" for row in found.rows())
    assert resolved(put("other name.txt", again)) == found


def test_unreadable_images_are_removed_from_the_splits_of_a_run(put):
    given = read_split(put("splits.csv", OF_A_RUN), source_of(PLAIN[1:], "s00"))
    found = resolve_splits(DataConfig(), 0, PLAIN[1:], FAR, given)
    assert found.labeled == ("s02",) and "s00" not in found.groups


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (OF_A_RUN + "s05,pair,val\n", "expected each group on one side, got pair in train and val"),
        (OF_A_RUN + "s05,s05,train\n", "line 7: expected the split labeled, unlabeled, val, test (with a column"),
        (OF_A_RUN + "s05,s05,Labeled\n", "got 'Labeled'"),
        (OF_A_RUN + "s00,s00,labeled\n", "line 7: expected each sample once, got s00 (labeled) again, as in "),
        (OF_A_RUN + "x1,x1,val\nx2,x2,test\n", "line 7: expected sample ids of the data set, got 2 that it does not"),
        (OF_A_RUN + "s05.png,s05,val\n", "does not have: s05.png; remove"),
        (OF_A_RUN + "s05,,val\n", "line 7: expected a value in every column"),
        (OF_A_RUN + "s05,s05\n", "line 7: expected 3 values (sample_id,group_id,split), got 2"),
        (OF_A_RUN.replace("val", "test"), "got none of val"),
        (OF_A_RUN.replace(",labeled", ",unlabeled"), "got none of labeled"),
        (HEADER, "got none below the header"),
    ],
)
def test_an_invalid_splits_csv_is_one_line_with_its_position(put, text, problem):
    line = refusal(put("splits.csv", text))
    assert "splits.csv" in line and problem in line and "\n" not in line


def test_a_labeled_sample_of_a_run_needs_a_mask(put):
    refs = [replace(ref, has_mask=ref.sample_id not in ("s00", "s01")) for ref in PLAIN]
    assert "for labeled, val and test, found none for s00;" in refusal(put("splits.csv", OF_A_RUN), refs)


# -- tables and lists

LISTS = {"train": IDS[:12], "val": IDS[12:15], "test": IDS[15:]}


def as_table(sides: dict[str, list[str]]) -> str:
    return "Sample_ID, split\n\n" + "".join(f"{i},{side.upper()}\n" for side, ids in sides.items() for i in ids)


def as_folder(put, sides: dict[str, list[str]], name: str = "lists", suffix: str = "") -> str:
    for side, ids in sides.items():
        given = put(f"{name}/{side}.txt", "\r\n\n" + "\r\n".join(f" {i}{suffix}" for i in ids))
    return str(Path(given).parent)


def test_a_table_and_lists_give_the_same_splits(put):
    found = resolved(put("anything", as_table(LISTS)))
    assert (list(found.val), list(found.test)) == (LISTS["val"], LISTS["test"])
    assert len(found.labeled) == 6 and sorted(found.labeled + found.unlabeled) == LISTS["train"]
    for folder in (as_folder(put, LISTS), as_folder(put, LISTS, "suffix", ".JPG")):
        assert resolved(folder) == found
    files = [put(f"one {side}_ids.txt", lines(*ids)) for side, ids in LISTS.items()]
    assert resolved(", ".join(files)) == found


def test_a_given_split_replaces_the_official_one(put):
    own = [replace(ref, split="test" if n < 10 else "train") for n, ref in enumerate(PLAIN)]
    assert resolved(as_folder(put, LISTS), refs=own) == resolved(as_folder(put, LISTS))


def test_a_missing_side_is_drawn_from_train(put):
    found = resolved(as_folder(put, {"train": IDS[:12], "test": IDS[15:]}), val_fraction=0.2)
    assert list(found.test) == IDS[15:] and len(found.val) == 3 and set(found.val) < set(IDS[:12])
    assert set(found.groups) == {*IDS[:12], *IDS[15:]}
    found = resolved(as_folder(put, {"train": IDS[:12], "val": IDS[15:]}, "b"), test_fraction=0.2)
    assert list(found.val) == IDS[15:] and len(found.test) == 3 and set(found.test) < set(IDS[:12])


@pytest.mark.parametrize("as_file", [True, False])
def test_without_a_train_list_all_other_samples_are_train(put, as_file):
    given = as_folder(put, {"val": IDS[:4]})
    found = resolved(f"{given}/val.txt" if as_file else given, test_fraction=0)
    assert list(found.val) == IDS[:4]
    assert sorted(found.labeled + found.unlabeled) == IDS[4:]


def test_a_group_id_selects_all_its_samples(put):
    refs = [SampleRef(f"volume-{n // 4}/slice-{n % 4}", f"volume-{n // 4}") for n in range(20)]
    hashes = {ref.sample_id: FAR[IDS[n]] for n, ref in enumerate(refs)}
    given = as_folder(put, {"val": ["volume-1"], "test": ["volume-2.nii.gz"]})
    found = resolved(given, refs, hashes, duplicate_distance=-1)
    assert found.val == tuple(f"volume-1/slice-{n}" for n in range(4))
    assert found.test == tuple(f"volume-2/slice-{n}" for n in range(4))
    put("lists/val.txt", "volume-1\nvolume-1/slice-2\n")
    assert "got volume-1/slice-2 (val) again" in refusal(given, refs)


def test_copies_in_several_lists_stay_in_test_else_in_validation(put):
    hashes = FAR | {"s00": FAR["s15"], "s01": FAR["s12"], "s13": FAR["s16"], "s03": FAR["s04"]}
    found = resolved(as_folder(put, LISTS), hashes=hashes, duplicate_distance=0)
    assert set(IDS) - set(found.groups) == {"s00", "s01", "s13"}
    assert found.groups["s04"] == "s03"


def test_entries_of_skipped_samples_are_ignored(put):
    found = resolved(as_folder(put, LISTS), PLAIN[1:-1], skipped=("s00", "s19"))
    assert len(found.groups) == 18
    slices = [SampleRef(f"v{n}/slice-0", f"v{n}") for n in range(9)]
    given = as_folder(put, {"train": ["v0", "v1", "v9/slice-3"], "val": ["v2"], "test": ["v8", "v9/slice-0"]}, "v")
    found = resolved(given, slices, {r.sample_id: FAR[IDS[n]] for n, r in enumerate(slices)}, ("v9",))
    assert found.test == ("v8/slice-0",)


def test_only_the_content_changes_the_fingerprint(put):
    def fingerprint(given: str) -> str:
        return read_split(given, source_of(PLAIN)).fingerprint

    same = {
        fingerprint(put("a.csv", as_table(LISTS))),
        fingerprint(as_folder(put, LISTS)),
        fingerprint(as_folder(put, LISTS, "b")),
    }
    moved = LISTS | {"val": LISTS["val"][1:], "test": [*LISTS["test"], LISTS["val"][0]]}
    assert len(same) == 1 and fingerprint(as_folder(put, moved, "c")) not in same
    shuffled = HEADER + "\n\n".join(OF_A_RUN.splitlines()[:0:-1])
    assert fingerprint(put("one.csv", OF_A_RUN)) == fingerprint(put("two.csv", shuffled))
    assert fingerprint(put("three.csv", OF_A_RUN.replace("s01,pair,un", "s01,pair,"))) != fingerprint(
        put("one.csv", OF_A_RUN)
    )


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("a.csv", "sample_id,split\ns00,train\ns01,valid\n", "line 3: expected the split train, val, test (without"),
        ("a.csv", "sample_id,split\ns00,labeled\n", "got 'labeled'"),
        ("a.csv", "sample_id,split\ns00,train\ns00.png,val\n", "line 3: expected each sample once, got s00 (val)"),
        ("a.csv", "sample_id,split\ns00,train\nx,val\n", "line 3: expected sample ids of the data set, got 1 that"),
        ("a.csv", "sample_id,split\n", "expected rows of sample_id,split, got none below the header"),
        ("a.csv", "sample_id,split\ns00,val,1\n", "line 2: expected 2 values (sample_id,split), got 3"),
        ("a.csv", "sample_id,split\n,val\n", "line 2: expected a value in every column"),
        ("a.csv", 'sample_id,split\n"s00,val\n', "expected a CSV file"),
        ("a.csv", "image,side\ns00,val\n", "line 1: expected the header sample_id,split, or sample_id,group_id,split"),
        ("a.csv", "sample_id:split\ns00:val\n", "got 'sample_id:split'; mend that line"),
        (
            "a.csv",
            ",sample_id,split\nx,s00,val\n",
            "line 2: expected a row number in the column without a name, got 'x'",
        ),
        ("a.csv", "sample_id,split,age\ns00,val,3\n", "and remove other columns"),
        ("a.csv", "sample_id,split\n" + "".join(f"{i},val\n" for i in IDS), "samples to train on, got none"),
        ("a.csv", "", "got an empty file"),
        ("val.txt", " \n\n", "got an empty file"),
        ("val.txt", b"\xff\xd8\xff\xe0 an image", "expected a text file in UTF-8, got something else"),
        ("val.txt", b"s00\0\0\0", "expected a text file in UTF-8, got something else"),
        ("val.txt", "s00\ns01\n\ns00\n", "line 4: expected each sample once, got s00 (val) again, as in "),
        ("val.txt", "s00\nx1\nx2\n", "line 2: expected sample ids of the data set, got 2 that it does not have: x1,"),
        ("ids.txt", "s00\n", "with train, val or test in its file name"),
        ("train_val.txt", "s00\n", "with train, val or test in its file name"),
    ],
)
def test_an_invalid_file_is_one_line_that_names_it(put, name, text, problem):
    line = refusal(put(name, text))
    assert name in line and problem in line and "\n" not in line


def test_an_id_in_two_lists_is_refused(put):
    line = refusal(as_folder(put, {"train": ["s00", "s01"], "val": ["s02", "s01"]}))
    assert "val.txt, line 4: expected each sample once, got s01 (val) again, as in " in line
    assert "train.txt, line 4 (train)" in line


def test_unknown_ids_are_counted_and_the_first_named(put):
    line = refusal(put("val.txt", lines(*(f"x{n}" for n in range(90)))))
    assert "got 90 that it does not have: x0, x1, x2, x3, x4 and 85 more" in line


def test_missing_files_and_folders_without_lists_are_refused(put, tmp_path):
    assert "nowhere.txt: expected a text file, found no such file" in refusal(str(tmp_path / "nowhere.txt"))
    both = f"{put('train.txt', lines('s00'))},{tmp_path}/gone/val.txt"
    assert "gone/val.txt: expected a text file, found no such file" in refusal(both)
    (tmp_path / "empty").mkdir()
    assert "expected train.txt, val.txt or test.txt in" in refusal(str(tmp_path / "empty"))
    put("run/splits.csv", OF_A_RUN)
    assert refusal(str(tmp_path / "run")).endswith(f"pass --data.split_file {tmp_path}/run/splits.csv")


@pytest.mark.parametrize("name", ["a.csv", "val.txt"])
def test_a_pipe_is_refused_and_not_opened(tmp_path, name):
    os.mkfifo(tmp_path / name)
    assert f"{name}: expected a text file, got a pipe" in refusal(str(tmp_path / name))


ODD = ["a\rb", "c\nd", 'e"f', "=1+1", "g,h", " lead", "trail ", "i;j", "k\u2028l", "\x85m", "n\x0bo", "p\tq", "e\u0301"]
"""Names that a file may have."""


def test_odd_names_come_back_from_the_table_of_a_run(tmp_path):
    refs = [SampleRef(name, name.strip()) for name in ODD]
    parts = ["labeled", "unlabeled", "val", "test"]
    rows = [(ref.sample_id, ref.group_id, parts[n % 4]) for n, ref in enumerate(refs)]
    write_csv(tmp_path / "splits.csv", ("sample_id", "group_id", "split"), rows)
    given = read_split(str(tmp_path / "splits.csv"), source_of(refs))
    assert list(given.rows) == rows


def test_odd_names_are_found_in_lists_and_tables(put, tmp_path):
    names = [name for name in ODD if name == name.strip() and not {"\r", "\n"} & {*name}]
    refs = [SampleRef(name, name) for name in [*names, "other"]]
    lists = read_split(put("val.txt", "\r\n".join(names)), source_of(refs))
    assert {name for name, side in lists.sides.items() if side == "val"} == {*names}
    write_csv(tmp_path / "t.csv", ("sample_id", "split"), [(name, "Val") for name in names])
    assert read_split(str(tmp_path / "t.csv"), source_of(refs)).sides == lists.sides


@pytest.mark.parametrize(
    "text",
    [
        "\ufeffsample_id;split\ns00;val\n",
        ",sample_id,split\n0,s00,val\n",
        "Unnamed: 0\tsample_id\tsplit\n0\ts00\tval\n",
        '"sample_id","split"\r"s00","val"\r',
    ],
)
def test_tables_of_pandas_and_excel_are_read(put, text):
    assert read_split(put("t.txt", text), source_of(PLAIN)).sides["s00"] == "val"


# -- real data


@needs_data
def test_lists_as_published_for_kvasir_are_read(put):
    source = KvasirSeg(Path(DATA) / "kvasir_seg")
    ids = [ref.sample_id for ref in source.refs()]
    given = read_split(as_folder(put, {"train": ids[36:], "test": ids[:36]}), source)
    found = resolve_splits(DataConfig(duplicate_distance=-1), 0, source.refs(), {}, given)
    assert list(found.test) == ids[:36] and len(found.val) == 30 and len(found.groups) == 300

"""COVID-QU-Ex as a data set: tasks, labels, official splits, copies in one group, one error for each misfit."""

from __future__ import annotations

import os
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.covid_files import (
    COVID_IMAGE,
    IDS,
    INFECTION,
    LUNG,
    NAMES,
    SHAPE,
    block,
    build_both_parts,
    build_part,
    copy_file,
    grey_noise,
)
from helpers.image_files import save_image

from kmine.config.data import COVID_CLASSES, DataConfig
from kmine.data import open_source
from kmine.data.cache.sample_cache import SampleCache
from kmine.data.datasets import covid_qu_ex_index
from kmine.data.datasets.covid_qu_ex import CovidQuEx
from kmine.data.splits import make_splits
from kmine.errors import SampleError, UserError
from kmine.io.files import safe_name

DATA = os.environ.get("KMINE_TEST_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="KMINE_TEST_DATA is not set to the folder that holds covid_qu_ex/")
COVID_ID = "COVID-19/covid_1 (2)"


@pytest.fixture
def root(tmp_path) -> Path:
    return build_both_parts(tmp_path / "data")


def opened(root: Path, **settings) -> CovidQuEx:
    return open_source(DataConfig(name="covid_qu_ex", root=str(root), **settings))


def splits_of(refs):
    return make_splits(refs, label_fraction=1.0, val_fraction=0.1, test_fraction=0.25, split_seed=0, seed=0)


# -- tasks


def test_infection_by_hand(root):
    source = opened(root)
    assert source.name == "covid_qu_ex" and source.class_names == ("background", "infection")
    assert tuple(ref.sample_id for ref in source.refs()) == IDS and source.skipped == ()
    for ref in source.refs():
        split, name, _ = ref.sample_id.split("/")
        assert (ref.split, ref.image_label) == (split.lower(), int(name == "COVID-19"))
        assert ref.group_id == ref.sample_id and ref.has_mask and ref.spacing is None
        grey = grey_noise(True, split, name)
        np.testing.assert_array_equal(source.image(ref.sample_id), np.dstack([grey] * 3))
        np.testing.assert_array_equal(source.mask(ref.sample_id), block(int(name == "COVID-19")))
        assert source.image(ref.sample_id).dtype == source.mask(ref.sample_id).dtype == np.uint8


def test_lung_by_hand(root):
    source = opened(root, task="lung")
    assert source.class_names == ("background", "lung")
    assert tuple(ref.sample_id for ref in source.refs()) == IDS
    assert {ref.image_label for ref in source.refs()} == {None}, "every image shows lungs"
    np.testing.assert_array_equal(source.image(IDS[0])[..., 0], grey_noise(False, *IDS[0].split("/")[:2]))
    np.testing.assert_array_equal(source.mask(IDS[0]), block(1))


def test_tasks_of_others_are_refused(root):
    for task in ("tumour", "liver", "both"):
        with pytest.raises(UserError, match=rf"data.task: expected auto or one of infection, lung .*, got '{task}'"):
            opened(root, task=task)
    assert opened(root, task="infection").fingerprint() == opened(root).fingerprint()


def test_without_the_lung_part_the_lung_masks_of_the_other_are_used(tmp_path, caplog):
    build_part(tmp_path / INFECTION, infection=True)
    source = opened(tmp_path, task="lung")
    assert "no lung part here; the lung masks of the infection part are used" in caplog.text
    np.testing.assert_array_equal(source.mask("Test/Normal/Normal (1)"), block(1))
    assert {ref.image_label for ref in source.refs()} == {None}
    caplog.clear()
    assert len(opened(tmp_path).refs()) == 9 and not caplog.text


def test_infection_needs_the_infection_part(tmp_path):
    build_part(tmp_path / LUNG, infection=False)
    with pytest.raises(UserError, match=r"found only the lung part at .*Kaggle.*or pass --data.task lung") as error:
        opened(tmp_path)
    assert "\n" not in str(error.value)


# -- classes and splits


def test_official_splits_are_used_and_ids_make_file_names(root):
    splits = splits_of(opened(root).refs())
    assert {name: {i.split("/")[0] for i in getattr(splits, name)} for name in ("labeled", "val", "test")} == {
        "labeled": {"Train"},
        "val": {"Val"},
        "test": {"Test"},
    }
    assert len({safe_name(i) for i in IDS}) == len(IDS)
    assert safe_name("Train/COVID-19/covid_1 (2)") == "Train%2FCOVID-19%2Fcovid_1 (2)"


def test_classes_are_selected(root):
    source = opened(root, classes=("Normal", "COVID-19"))
    assert [ref.sample_id for ref in source.refs()] == [i for i in IDS if "Non-COVID" not in i]
    assert source.fingerprint() == opened(root, classes=("COVID-19", "Normal")).fingerprint()
    assert source.fingerprint() != opened(root).fingerprint()


def test_a_missing_class_is_refused(tmp_path):
    build_part(tmp_path, infection=True, names={name: NAMES[name] for name in COVID_CLASSES[:2]})
    with pytest.raises(UserError, match=r"class Normal, found none; .*--data.classes '\[COVID-19, Non-COVID\]'"):
        opened(tmp_path)
    assert len(opened(tmp_path, classes=COVID_CLASSES[:2]).refs()) == 6


def test_a_pickled_source_reads_the_same(root):
    source = opened(root)
    refs = source.refs()
    copy = pickle.loads(pickle.dumps(source))
    assert copy.refs() == refs and copy.fingerprint() == source.fingerprint()
    np.testing.assert_array_equal(copy.image(IDS[0]), source.image(IDS[0]))


def test_the_cache_reads_it(root, tmp_path):
    cache = SampleCache(opened(root), 32, tmp_path / "cache")
    assert cache.decode_masks(IDS) == () and cache.native_shape(IDS[0]) == SHAPE


# -- files that do not fit


def test_hidden_files_are_ignored_and_foreign_ones_listed(root):
    folder = root / INFECTION / "Train/Normal/images"
    (folder / "._Normal (1).png").write_bytes(b"resource fork")
    (folder / "Thumbs.db").write_bytes(b"x")
    (root / "__MACOSX" / INFECTION / "Train/Normal/images").mkdir(parents=True)
    source = opened(root)
    assert [Path(skipped.path).name for skipped in source.skipped] == ["Thumbs.db"]
    assert len(source.refs()) == 9


def test_images_without_masks_are_unlabeled(root):
    (root / INFECTION / "Train/COVID-19/infection masks/covid_1 (2).png").unlink()
    source = opened(root)
    assert {ref.sample_id for ref in source.refs() if not ref.has_mask} == {f"Train/{COVID_ID}"}
    with pytest.raises(SampleError, match=r"expected a mask of the same name in infection masks, found none"):
        source.mask(f"Train/{COVID_ID}")
    assert splits_of(source.refs()).unlabeled == (f"Train/{COVID_ID}",)


def test_without_any_mask_the_part_is_refused(root):
    for path in (root / LUNG).rglob("lung masks/*.png"):
        path.unlink()
    with pytest.raises(UserError, match=r"expected folders of lung masks beside those of images"):
        opened(root, task="lung")


def test_masks_without_images_stop_or_are_listed(root):
    for n in range(7):
        save_image(root / INFECTION / "Val/Normal/infection masks" / f"lost ({n}).png", block(0))
    with pytest.raises(UserError, match=r"none for .*lost \(0\)\.png, .* and 2 more; .*--data.on_error skip"):
        opened(root)
    source = opened(root, on_error="skip")
    assert [skipped.sample_id for skipped in source.skipped] == [f"Val/Normal/lost ({n})" for n in range(7)]
    assert len(source.refs()) == 9


def test_pairs_have_the_same_split_class_and_name(root):
    folder = root / INFECTION / "Train/COVID-19"
    (folder / "images/covid_1 (2).png").rename(folder / "images/Normal (1).png")
    (folder / "infection masks/covid_1 (2).png").unlink()
    source = opened(root)
    assert {ref.sample_id: ref.has_mask for ref in source.refs() if "Normal (1)" in ref.sample_id} == {
        "Test/Normal/Normal (1)": True,
        "Train/COVID-19/Normal (1)": False,
        "Train/Normal/Normal (1)": True,
        "Val/Normal/Normal (1)": True,
    }


def test_a_mask_of_another_size_is_refused(root):
    save_image(root / INFECTION / "Train/COVID-19/infection masks/covid_1 (2).png", block(shape=(20, 24)))
    with pytest.raises(SampleError, match=r"expected the image's size 20 x 24 .*got 24 x 20"):
        opened(root).mask(f"Train/{COVID_ID}")


def test_colour_images_are_read(root):
    colours = np.dstack([grey_noise(n) for n in range(3)])
    save_image(root / INFECTION / "Train" / COVID_IMAGE, colours)
    np.testing.assert_array_equal(opened(root).image(f"Train/{COVID_ID}"), colours)


# -- copies


def groups_of(source: CovidQuEx) -> dict[str, str]:
    return {ref.sample_id: ref.group_id for ref in source.refs() if ref.group_id != ref.sample_id}


def test_copies_are_read_at_the_first_call_of_refs(root, monkeypatch):
    hashed: list[Path] = []
    original = covid_qu_ex_index._content_fingerprint
    monkeypatch.setattr(covid_qu_ex_index, "_content_fingerprint", lambda path: hashed.append(path) or original(path))
    copy_file(root / INFECTION / "Train" / COVID_IMAGE, root / LUNG / "Test" / COVID_IMAGE)
    source, lung = opened(root), opened(root, task="lung")
    assert hashed == [], "opening reads no file"
    (group,) = groups_of(source).values()
    assert groups_of(source) == {f"Train/{COVID_ID}": group} and groups_of(lung) == {f"Test/{COVID_ID}": group}
    assert source.refs() is source.refs() and hashed


def test_copies_in_two_splits_stay_in_one(root):
    copy_file(root / INFECTION / "Train" / COVID_IMAGE, root / INFECTION / "Test" / COVID_IMAGE)
    source = opened(root)
    found = groups_of(source)
    assert set(found) == {f"Train/{COVID_ID}", f"Test/{COVID_ID}"} and len(set(found.values())) == 1
    splits = splits_of(source.refs())
    assert f"Test/{COVID_ID}" in splits.test
    assert f"Train/{COVID_ID}" not in (*splits.labeled, *splits.unlabeled, *splits.val)
    assert len(splits.labeled) == 2


def test_copies_in_both_parts_stay_in_one_split_of_a_joint_data_set(root):
    """Ids of the two tasks are made unique, groups are kept."""
    copy_file(root / INFECTION / "Train" / COVID_IMAGE, root / LUNG / "Val" / COVID_IMAGE)
    refs = [
        replace(
            ref, sample_id=f"{task}/{ref.sample_id}", group_id=ref.group_id if "#" in ref.group_id else task + str(n)
        )
        for task in ("infection", "lung")
        for n, ref in enumerate(opened(root, task=task).refs())
    ]
    splits = splits_of(refs)
    assert f"lung/Val/{COVID_ID}" in splits.val
    assert f"infection/Train/{COVID_ID}" not in (*splits.labeled, *splits.unlabeled)


def test_a_group_is_not_merged_with_another_image_of_its_id(root):
    """Lung Test/x is a copy of infection Train/x, but infection Test/x is another image."""
    copy_file(root / INFECTION / "Train" / COVID_IMAGE, root / LUNG / "Test" / COVID_IMAGE)
    splits = splits_of(opened(root).refs())
    assert f"Train/{COVID_ID}" in splits.labeled and f"Test/{COVID_ID}" in splits.test


def test_the_fingerprint_follows_files_and_possible_copies(root):
    save_image(root / LUNG / "Val/Normal/images/single.png", grey_noise())
    seen = {opened(root).fingerprint(), opened(root, task="lung").fingerprint()}
    os.utime(root / LUNG / "Val/Normal/images/single.png", ns=(1, 1))
    assert opened(root).fingerprint() in seen, "a file of the other part, of no image's name in this one"
    os.utime(root / INFECTION / "Val/Normal/infection masks/Normal (1).png", ns=(1, 1))
    seen.add(opened(root).fingerprint())
    copy_file(root / INFECTION / "Train" / COVID_IMAGE, root / LUNG / "Test" / COVID_IMAGE)
    seen.add(opened(root).fingerprint())
    assert len(seen) == 4


# -- the real folder


@needs_data
def test_real_folder():
    root = Path(DATA) / "covid_qu_ex"
    counts = {"infection": {"Train": 58, "Val": 14, "Test": 18}, "lung": {"Train": 84, "Val": 20, "Test": 26}}
    for task, expected in counts.items():
        source = opened(root, task=task)
        refs = source.refs()
        assert {s: sum(ref.split == s.lower() for ref in refs) for s in expected} == expected
        assert all(ref.has_mask and ref.group_id == ref.sample_id for ref in refs)
        assert [Path(skipped.path).name for skipped in source.skipped] == ["genuine_samples"]
        for ref in refs[::15]:
            image, mask = source.image(ref.sample_id), source.mask(ref.sample_id)
            assert image.shape == (256, 256, 3) and (image == image[..., :1]).all() and image.std() > 10
            assert mask.shape == (256, 256) and set(np.unique(mask)) <= {0, 1}
        shown = {ref.sample_id for ref in refs if source.mask(ref.sample_id).any()}
        if task == "lung":
            assert len(shown) == len(refs)
        else:
            assert {ref.image_label for ref in refs if ref.sample_id in shown} == {1}
            assert sum(ref.image_label for ref in refs) - len(shown) == 1, "one case of COVID-19 without infection"


@needs_data
def test_real_infections_lie_in_the_lungs():
    """Twelve files of COVID-QU-Ex itself."""
    root = Path(DATA) / "covid_qu_ex" / "genuine_samples"
    infection, lung = opened(root), opened(root, task="lung")
    refs = infection.refs()
    assert len(refs) == 12 and {ref.split for ref in refs} == {"test"}
    assert sum(ref.image_label for ref in refs) == 4
    for ref in refs:
        lungs, infected = lung.mask(ref.sample_id), infection.mask(ref.sample_id)
        assert lungs.any() and infected.any() == bool(ref.image_label)
        assert not infected.any() or lungs[infected == 1].mean() > 0.5

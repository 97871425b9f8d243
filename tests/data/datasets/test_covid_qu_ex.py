"""COVID-QU-Ex by hand: the layouts people have, copies of one picture in several places, and one clear error each."""

from __future__ import annotations

import os
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kmine.config import COVID_CLASSES, DataConfig
from kmine.data import open_source
from kmine.data.cache.sample_cache import SampleCache
from kmine.data.datasets import covid_qu_ex_index as covid_files
from kmine.data.datasets.covid_qu_ex import CovidQuEx
from kmine.data.splits import make_splits
from kmine.errors import SampleError, UserError
from kmine.io.files import safe_name

DATA = os.environ.get("KMINE_TEST_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="KMINE_TEST_DATA is not set to the folder that holds covid_qu_ex/")

INFECTION = "Infection Segmentation Data/Infection Segmentation Data"
LUNG = "Lung Segmentation Data/Lung Segmentation Data"
NAMES = {"COVID-19": "covid_1 (2)", "Non-COVID": "non_COVID (7)", "Normal": "Normal (1)"}
IDS = tuple(sorted(f"{split}/{name}/{stem}" for split in ("Train", "Val", "Test") for name, stem in NAMES.items()))


def save(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


def picture(*key: object, shape=(24, 20)) -> np.ndarray:
    """Grey noise, of its own for each key."""
    seed = list("/".join(map(str, key)).encode())
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def disc(value=255, shape=(24, 20)) -> np.ndarray:
    mask = np.zeros(shape, np.uint8)
    mask[4:9, 3:8] = value
    return mask


def build_part(base: Path, *, infection: bool, names=NAMES) -> None:
    for split in ("Train", "Val", "Test"):
        for name, stem in names.items():
            folder = base / split / name
            save(folder / "images" / f"{stem}.png", picture(infection, split, name))
            save(folder / "lung masks" / f"{stem}.png", disc())
            if infection:
                save(folder / "infection masks" / f"{stem}.png", disc(255 if name == "COVID-19" else 0))


@pytest.fixture
def root(tmp_path) -> Path:
    """Both parts, as published; no picture is in both."""
    build_part(tmp_path / "data" / INFECTION, infection=True)
    build_part(tmp_path / "data" / LUNG, infection=False)
    return tmp_path / "data"


def opened(root: Path, **settings) -> CovidQuEx:
    return open_source(DataConfig(name="covid_qu_ex", root=str(root), **settings))


def splits_of(refs, **changes):
    settings = {"label_fraction": 1.0, "val_fraction": 0.1, "test_fraction": 0.25, "split_seed": 0, "seed": 0}
    return make_splits(refs, **{**settings, **changes})


# -- what is read


def test_infection_by_hand(root):
    source = opened(root)
    assert source.name == "covid_qu_ex" and source.class_names == ("background", "infection")
    assert tuple(ref.sample_id for ref in source.refs()) == IDS and source.skipped == ()
    for ref in source.refs():
        split, name, _ = ref.sample_id.split("/")
        assert (ref.split, ref.image_label) == (split.lower(), int(name == "COVID-19"))
        assert ref.group_id == ref.sample_id and ref.has_mask and ref.spacing is None
        grey = picture(True, split, name)
        np.testing.assert_array_equal(source.image(ref.sample_id), np.dstack([grey] * 3))
        np.testing.assert_array_equal(source.mask(ref.sample_id), disc(int(name == "COVID-19")))
        assert source.image(ref.sample_id).dtype == source.mask(ref.sample_id).dtype == np.uint8


def test_lung_by_hand(root):
    source = opened(root, task="lung")
    assert source.class_names == ("background", "lung")
    assert tuple(ref.sample_id for ref in source.refs()) == IDS
    assert {ref.image_label for ref in source.refs()} == {None}, "every image shows lungs"
    np.testing.assert_array_equal(source.image(IDS[0])[..., 0], picture(False, *IDS[0].split("/")[:2]))
    np.testing.assert_array_equal(source.mask(IDS[0]), disc(1))


def test_official_splits_are_kept_and_ids_make_file_names(root):
    splits = splits_of(opened(root).refs())
    assert {name: {i.split("/")[0] for i in getattr(splits, name)} for name in ("labeled", "val", "test")} == {
        "labeled": {"Train"},
        "val": {"Val"},
        "test": {"Test"},
    }
    assert len({safe_name(i) for i in IDS}) == len(IDS)
    assert safe_name("Train/COVID-19/covid_1 (2)") == "Train%2FCOVID-19%2Fcovid_1 (2)"


def test_threshold_is_above_127(root):
    values = np.zeros((24, 20), np.uint8)
    values[0, :4] = (1, 127, 128, 255)
    save(root / INFECTION / "Train/COVID-19/infection masks/covid_1 (2).png", values)
    assert opened(root).mask("Train/COVID-19/covid_1 (2)")[0, :5].tolist() == [0, 0, 1, 1, 0]


def test_classes_are_chosen(root):
    source = opened(root, classes=("Normal", "COVID-19"))
    assert [ref.sample_id for ref in source.refs()] == [i for i in IDS if "Non-COVID" not in i]
    assert source.fingerprint() == opened(root, classes=("COVID-19", "Normal")).fingerprint()
    assert source.fingerprint() != opened(root).fingerprint()


def test_tasks_of_others_are_refused(root):
    for task in ("tumour", "liver", "both"):
        with pytest.raises(UserError, match=rf"data.task: expected auto or one of infection, lung .*, got '{task}'"):
            opened(root, task=task)
    assert opened(root, task="infection").fingerprint() == opened(root).fingerprint()


def test_pickled_it_reads_on(root):
    source = opened(root)
    refs = source.refs()
    copy = pickle.loads(pickle.dumps(source))
    assert copy.refs() == refs and copy.fingerprint() == source.fingerprint()
    np.testing.assert_array_equal(copy.image(IDS[0]), source.image(IDS[0]))


def test_the_cache_takes_it(root, tmp_path):
    cache = SampleCache(opened(root), 32, tmp_path / "cache")
    assert cache.decode_masks(IDS) == () and cache.native_shape(IDS[0]) == (24, 20)


# -- layouts


@pytest.mark.parametrize(
    ("infection", "lung"),
    [
        ("Infection Segmentation Data", "Lung Segmentation Data"),
        (f"COVID-QU-Ex/archive (1)/{INFECTION}", f"COVID-QU-Ex/archive (1)/{LUNG}"),
        ("infection_segmentation_data", "lung-segmentation-data"),
        ("a", "b"),
        (INFECTION, "b"),
    ],
)
@pytest.mark.parametrize("task", ["infection", "lung"])
def test_parts_are_found_wherever_they_lie(tmp_path, infection, lung, task):
    build_part(tmp_path / infection, infection=True)
    build_part(tmp_path / lung, infection=False)
    source = opened(tmp_path, task=task)
    assert tuple(ref.sample_id for ref in source.refs()) == IDS and source.skipped == ()
    expected = picture(task == "infection", *IDS[0].split("/")[:2])
    np.testing.assert_array_equal(source.image(IDS[0])[..., 0], expected)


def test_the_folder_of_one_part_may_be_passed(root):
    for folder in (INFECTION, "Infection Segmentation Data"):
        assert len(opened(root / folder).refs()) == 9
    assert len(opened(root / LUNG, task="lung").refs()) == 9


def test_spelling_of_folders_is_forgiven(tmp_path):
    build_part(tmp_path, infection=True)
    for folder in sorted(tmp_path.glob("*/*/*"), reverse=True):
        folder.rename(folder.with_name(folder.name.replace(" ", "_").title()))
    for folder in (*tmp_path.glob("*/*"), *tmp_path.glob("*")):
        folder.rename(folder.with_name(folder.name.lower()))
    assert (tmp_path / "train/covid-19/Infection_Masks").is_dir()
    assert tuple(ref.sample_id for ref in opened(tmp_path).refs()) == IDS
    (tmp_path / "train/COVID-19/images").mkdir(parents=True)
    with pytest.raises(UserError, match=r"expected it once, found .*covid-19/Images as well"):
        opened(tmp_path)


def test_without_the_lung_part_the_lung_masks_of_the_other_are_used_and_this_is_said(tmp_path, caplog):
    build_part(tmp_path / INFECTION, infection=True)
    source = opened(tmp_path, task="lung")
    assert "no lung part here; the lung masks of the infection part are used" in caplog.text
    np.testing.assert_array_equal(source.mask("Test/Normal/Normal (1)"), disc(1))
    assert {ref.image_label for ref in source.refs()} == {None}
    caplog.clear()
    assert len(opened(tmp_path).refs()) == 9 and not caplog.text


def test_without_the_infection_part_there_is_no_infection(tmp_path):
    build_part(tmp_path / LUNG, infection=False)
    with pytest.raises(UserError, match=r"found only the lung part at .*Kaggle.*or pass --data.task lung") as error:
        opened(tmp_path)
    assert "\n" not in str(error.value)


def test_a_folder_of_another_name_gives_way_and_is_listed(root):
    build_part(root / "samples", infection=True)
    (skipped,) = opened(root).skipped
    assert (skipped.sample_id, skipped.path) == ("samples", str(root / "samples"))
    assert len(opened(root / "samples").refs()) == 9


def test_two_folders_that_might_be_meant(tmp_path):
    build_part(tmp_path / "one", infection=True)
    build_part(tmp_path / "two", infection=True)
    with pytest.raises(UserError, match=r"one folder of the infection part, found .*/one and .*/two; pass the one"):
        opened(tmp_path)


def test_hidden_and_foreign_files(root):
    folder = root / INFECTION / "Train/Normal/images"
    (folder / "._Normal (1).png").write_bytes(b"resource fork")
    (folder / "Thumbs.db").write_bytes(b"x")
    (root / "__MACOSX" / INFECTION / "Train/Normal/images").mkdir(parents=True)
    source = opened(root)
    assert [Path(skipped.path).name for skipped in source.skipped] == ["Thumbs.db"]
    assert len(source.refs()) == 9


def test_folders_that_hold_nothing(tmp_path):
    with pytest.raises(UserError, match=r"found nothing; pass --data.root \(published on Kaggle as .COVID-QU-Ex"):
        opened(tmp_path / "nowhere")
    (tmp_path / "archive.zip").write_bytes(b"PK")
    with pytest.raises(UserError, match="found a file; unpack it"):
        opened(tmp_path / "archive.zip")
    with pytest.raises(UserError, match=r"expected Train/COVID-19/images or the like in it or below, found none"):
        opened(tmp_path)
    with pytest.raises(UserError, match=r"data.root: expected the folder that holds COVID-QU-Ex, got nothing"):
        open_source(DataConfig(name="covid_qu_ex"))
    build_part(tmp_path / "part", infection=True)
    with pytest.raises(UserError, match=r"expected Train/COVID-19/images"):
        opened(tmp_path / "part/Train")


def test_a_class_that_is_not_there(tmp_path):
    build_part(tmp_path, infection=True, names={name: NAMES[name] for name in COVID_CLASSES[:2]})
    with pytest.raises(UserError, match=r"class Normal, found none; .*--data.classes '\[COVID-19, Non-COVID\]'"):
        opened(tmp_path)
    assert len(opened(tmp_path, classes=COVID_CLASSES[:2]).refs()) == 6


def test_an_unreadable_folder(root, monkeypatch):
    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(UserError, match="Permission denied"):
        opened(root)


# -- masks and images that do not fit


def test_missing_masks_are_unlabeled(root):
    (root / INFECTION / "Train/COVID-19/infection masks/covid_1 (2).png").unlink()
    source = opened(root)
    assert {ref.sample_id for ref in source.refs() if not ref.has_mask} == {"Train/COVID-19/covid_1 (2)"}
    with pytest.raises(SampleError, match=r"expected a mask of the same name in infection masks, found none"):
        source.mask("Train/COVID-19/covid_1 (2)")
    assert splits_of(source.refs()).unlabeled == ("Train/COVID-19/covid_1 (2)",)


def test_no_mask_at_all(root):
    for path in (root / LUNG).rglob("lung masks/*.png"):
        path.unlink()
    with pytest.raises(UserError, match=r"expected folders of lung masks beside those of images"):
        opened(root, task="lung")


def test_masks_without_images_are_named_or_listed(root):
    for n in range(7):
        save(root / INFECTION / "Val/Normal/infection masks" / f"lost ({n}).png", disc(0))
    with pytest.raises(UserError, match=r"none for Val/Normal/lost \(0\), .* and 2 more; .*--data.on_error skip"):
        opened(root)
    source = opened(root, on_error="skip")
    assert [skipped.sample_id for skipped in source.skipped] == [f"Val/Normal/lost ({n})" for n in range(7)]
    assert len(source.refs()) == 9


def test_pairs_are_by_split_and_class_and_name(root):
    """The same name elsewhere is no pair."""
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


def test_a_mask_of_another_size_or_coding(root):
    path = root / INFECTION / "Train/COVID-19/infection masks/covid_1 (2).png"
    save(path, disc(shape=(20, 24)))
    with pytest.raises(SampleError, match=r"expected the image's size 20 x 24 .*got 24 x 20"):
        opened(root).mask("Train/COVID-19/covid_1 (2)")
    save(path, disc(1))
    with pytest.raises(SampleError, match=r"store the foreground as 255 \(not 1\)"):
        opened(root).mask("Train/COVID-19/covid_1 (2)")


def test_images_in_colour_are_read_and_deep_ones_refused(root):
    path = root / INFECTION / "Train/COVID-19/images/covid_1 (2).png"
    colours = np.dstack([picture(n) for n in range(3)])
    save(path, colours)
    np.testing.assert_array_equal(opened(root).image("Train/COVID-19/covid_1 (2)"), colours)
    save(path, picture().astype(np.uint16) * 256)
    with pytest.raises(SampleError, match="got 16 or more"):
        opened(root).image("Train/COVID-19/covid_1 (2)")
    path.write_bytes(b"")
    with pytest.raises(SampleError, match="empty file"):
        opened(root).image("Train/COVID-19/covid_1 (2)")


# -- one picture in several places


def copy(root: Path, source: str, target: str) -> None:
    """An image, with masks of its own."""
    content = (root / source).read_bytes()
    (root / target).write_bytes(content)


@pytest.fixture
def digested(monkeypatch) -> list[Path]:
    """Files that are read to be compared."""
    read: list[Path] = []
    original = covid_files._content_fingerprint
    monkeypatch.setattr(covid_files, "_content_fingerprint", lambda path: read.append(path) or original(path))
    return read


def groups_of(source: CovidQuEx) -> dict[str, str]:
    return {ref.sample_id: ref.group_id for ref in source.refs() if ref.group_id != ref.sample_id}


def test_a_picture_in_both_parts_and_different_splits_is_one_group_of_one_name(root, digested):
    name = "COVID-19/images/covid_1 (2).png"
    copy(root, f"{INFECTION}/Train/{name}", f"{LUNG}/Test/{name}")
    infection, lung = opened(root), opened(root, task="lung")
    assert digested == [], "opening reads no file"
    (group,) = groups_of(infection).values()
    assert group.startswith("Test/COVID-19/covid_1 (2)#")
    assert groups_of(infection) == {"Train/COVID-19/covid_1 (2)": group}
    assert groups_of(lung) == {"Test/COVID-19/covid_1 (2)": group}
    assert infection.refs() is infection.refs()


def test_a_picture_in_two_splits_stays_on_one_side(root):
    name = "COVID-19/images/covid_1 (2).png"
    copy(root, f"{INFECTION}/Train/{name}", f"{INFECTION}/Test/{name}")
    refs = opened(root).refs()
    found = groups_of(opened(root))
    assert set(found) == {"Train/COVID-19/covid_1 (2)", "Test/COVID-19/covid_1 (2)"}
    assert len(set(found.values())) == 1
    splits = splits_of(refs)
    assert "Test/COVID-19/covid_1 (2)" in splits.test
    assert "Train/COVID-19/covid_1 (2)" not in (*splits.labeled, *splits.unlabeled, *splits.val)
    assert len(splits.labeled) == 2


def test_of_both_parts_together_one_side_keeps_a_picture(root):
    """As for a training on both tasks: the ids told apart, the groups as they are."""
    name = "COVID-19/images/covid_1 (2).png"
    copy(root, f"{INFECTION}/Train/{name}", f"{LUNG}/Val/{name}")
    refs = [
        replace(
            ref, sample_id=f"{task}/{ref.sample_id}", group_id=ref.group_id if "#" in ref.group_id else task + str(n)
        )
        for task in ("infection", "lung")
        for n, ref in enumerate(opened(root, task=task).refs())
    ]
    splits = splits_of(refs)
    assert "lung/Val/COVID-19/covid_1 (2)" in splits.val
    assert "infection/Train/COVID-19/covid_1 (2)" not in (*splits.labeled, *splits.unlabeled)


def test_a_picture_of_two_classes_is_one_group(root):
    folder = root / INFECTION
    save(folder / "Train/Normal/images/x.png", picture("x"))
    save(folder / "Train/Non-COVID/images/x.png", picture("x"))
    assert set(groups_of(opened(root))) == {"Train/Non-COVID/x", "Train/Normal/x"}


def test_the_same_place_in_both_parts_is_no_matter_and_read_by_nobody(root, digested):
    for split in ("Train", "Val", "Test"):
        for name, stem in NAMES.items():
            path = f"{split}/{name}/images/{stem}.png"
            save(root / INFECTION / path, picture(split, name, shape=(24, 20 + len(split) * 7 + len(name))))
            copy(root, f"{INFECTION}/{path}", f"{LUNG}/{path}")
    assert groups_of(opened(root)) == {} and digested == []


def test_files_of_equal_size_and_other_content_are_told_apart(root):
    path = root / INFECTION / "Train/COVID-19/images/covid_1 (2).png"
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    (root / INFECTION / "Test/COVID-19/images/covid_1 (2).png").write_bytes(bytes(content))
    assert groups_of(opened(root)) == {}


def test_a_group_is_not_mixed_up_with_another_picture_of_its_id(root):
    """Lung Test/x is infection Train/x, while infection Test/x is something else."""
    name = "COVID-19/images/covid_1 (2).png"
    copy(root, f"{INFECTION}/Train/{name}", f"{LUNG}/Test/{name}")
    splits = splits_of(opened(root).refs())
    assert "Train/COVID-19/covid_1 (2)" in splits.labeled and "Test/COVID-19/covid_1 (2)" in splits.test


def test_fingerprint_follows_files_and_those_that_may_be_copies(root):
    name = "COVID-19/images/covid_1 (2).png"
    save(root / LUNG / "Val/Normal/images/alone.png", picture())
    seen = {opened(root).fingerprint(), opened(root, task="lung").fingerprint()}
    os.utime(root / LUNG / "Val/Normal/images/alone.png", ns=(1, 1))
    assert opened(root).fingerprint() in seen, "of the other part, and like none of this"
    os.utime(root / INFECTION / "Val/Normal/infection masks/Normal (1).png", ns=(1, 1))
    seen.add(opened(root).fingerprint())
    copy(root, f"{INFECTION}/Train/{name}", f"{LUNG}/Test/{name}")
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
def test_genuine_samples():
    """Twelve files of COVID-QU-Ex itself: lungs are dark, and where there is infection it lies mostly in the lungs."""
    root = Path(DATA) / "covid_qu_ex" / "genuine_samples"
    infection, lung = opened(root), opened(root, task="lung")
    refs = infection.refs()
    assert len(refs) == 12 and {ref.split for ref in refs} == {"test"}
    assert sum(ref.image_label for ref in refs) == 4
    for ref in refs:
        lungs, infected = lung.mask(ref.sample_id), infection.mask(ref.sample_id)
        assert lungs.any() and infected.any() == bool(ref.image_label)
        assert not infected.any() or lungs[infected == 1].mean() > 0.5

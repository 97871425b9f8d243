"""Augmentation: determined by the seed, masks follow their images, class ids are never blended."""

import pickle
import subprocess
import sys

import numpy as np
import pytest

from kmine.data.augment import Augment
from kmine.data.resize import Resizer
from kmine.data.source import Symmetry

SIZE = 64

NO_NETWORK = """
import socket, sys
def refuse(*args, **kwargs):
    raise SystemExit("the network was used")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
import numpy as np
from kmine.data.augment import Augment
from kmine.data.resize import Resizer
augment = Augment(32)
assert "albumentations" not in sys.modules, "imported before use"
augment(np.zeros((32, 32, 3), np.uint8), np.zeros((32, 32), np.uint8), 0)
assert "albumentations" in sys.modules
"""


@pytest.fixture(scope="module")
def augment():
    return Augment(SIZE)


@pytest.fixture
def pair():
    rng = np.random.default_rng(5)
    image = rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    mask = rng.choice(np.array([0, 1, 2, 255], np.uint8), (SIZE, SIZE))
    return image, mask


def test_the_seed_determines_the_change(augment, pair):
    first = [augment(*pair, seed) for seed in range(20)]
    again = [augment(*pair, seed) for seed in reversed(range(20))][::-1]
    other = [Augment(SIZE)(*pair, seed) for seed in range(0, 20, 7)]
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a[0], b[0])
        np.testing.assert_array_equal(a[1], b[1])
    for a, b in zip(first[::7], other, strict=True):
        np.testing.assert_array_equal(a[0], b[0])


def test_global_seeds_are_neither_used_nor_changed(augment, pair):
    np.random.seed(0)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    image, _ = augment(*pair, 11)
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002
    np.random.seed(1)  # noqa: NPY002
    np.testing.assert_array_equal(augment(*pair, 11)[0], image)


def test_different_seeds_differ(augment, pair):
    images = {augment(*pair, seed)[0].tobytes() for seed in range(50)}
    assert len(images) > 40


@pytest.mark.parametrize(("flips", "num_corners"), [("none", 1), ("horizontal", 2), ("both", 4)])
def test_flips_are_drawn_independently(flips, num_corners):
    """Transforms share one random stream: a flip along one axis must not imply the other."""
    augment = Augment(SIZE, symmetry=Symmetry(flips))
    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask[:20, :20] = 1
    image = np.zeros((SIZE, SIZE, 3), np.uint8)
    corners = set()
    for seed in range(60):
        rows, cols = np.nonzero(augment(image, mask, seed)[1] == 1)
        if len(rows):
            corners.add((rows.mean() < SIZE / 2, cols.mean() < SIZE / 2))
    assert len(corners) == num_corners


def test_rotation_and_scale_stay_within_their_limits():
    """A square is as large as the scale allows, and its edges stay upright without rotation."""
    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask[24:40, 24:40] = 1
    image = np.zeros((SIZE, SIZE, 3), np.uint8)
    upright = Augment(SIZE, symmetry=Symmetry("none", 0.0, (0.5, 2.0)))
    turned = Augment(SIZE, symmetry=Symmetry("none", 180.0, (1.0, 1.0)))
    sides, shares = [], []
    for seed in range(60):
        rows, cols = np.nonzero(upright(image, mask, seed)[1] == 1)
        height, width = np.ptp(rows) + 1, np.ptp(cols) + 1
        assert height * width == len(rows), "a full rectangle"
        sides += [height, width]
        rows, cols = np.nonzero(turned(image, mask, seed)[1] == 1)
        assert abs(len(rows) - 256) < 20
        shares.append(len(rows) / ((np.ptp(rows) + 1) * (np.ptp(cols) + 1)))
    assert 8 <= min(sides) < 12 and 24 < max(sides) <= 33
    assert min(shares) < 0.6, "turned by about 45 degrees"


def test_shapes_and_types_are_kept_and_inputs_not_modified(augment, pair):
    image, mask = pair[0].copy(), pair[1].copy()
    for seed in range(20):
        new_image, new_mask = augment(image, mask, seed)
        assert new_image.shape == image.shape and new_image.dtype == np.uint8 and new_image.flags.c_contiguous
        assert new_mask.shape == mask.shape and new_mask.dtype == np.uint8 and new_mask.flags.c_contiguous
    np.testing.assert_array_equal(image, pair[0])
    np.testing.assert_array_equal(mask, pair[1])


def test_ids_are_never_blended(augment, pair):
    for seed in range(60):
        assert set(np.unique(augment(*pair, seed)[1])) <= {0, 1, 2, 255}


def test_pixels_from_outside_and_ignored_pixels_are_ignored(augment):
    image = np.full((SIZE, SIZE, 3), 200, np.uint8)
    known, unknown = np.zeros((SIZE, SIZE), np.uint8), np.full((SIZE, SIZE), 255, np.uint8)
    num_outside = 0
    for seed in range(40):
        new_image, new_mask = augment(image, known, seed)
        black = new_image.max(axis=2) < 20
        assert (new_mask[black] == 255).mean() > 0.9 if black.any() else True
        num_outside += bool((new_mask == 255).any())
        assert (augment(image, unknown, seed)[1] == 255).all()
    assert num_outside > 10


def test_the_mask_follows_its_object(augment):
    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask[18:40, 12:30] = 1
    image = np.where(mask[..., None] > 0, 220, 60).astype(np.uint8).repeat(3, axis=2)
    for seed in range(60):
        new_image, new_mask = augment(image, mask, seed)
        grey, inside = new_image.mean(axis=2), new_mask == 1
        bright = grey > (grey[inside].mean() + np.median(grey[new_mask == 0])) / 2
        overlap = 2 * (bright & inside).sum() / (bright.sum() + inside.sum())
        assert overlap > 0.9, seed


def test_grey_images_stay_grey(augment):
    grey = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 1), dtype=np.uint8).repeat(3, axis=2)
    for seed in range(30):
        image = augment(grey, np.zeros((SIZE, SIZE), np.uint8), seed)[0].astype(int)
        assert np.abs(image - image[..., :1]).max() <= 2, seed


def test_the_strong_view_has_the_same_geometry_and_larger_changes(augment):
    """Nothing is erased: the object is visible where its mask is."""
    strong = Augment(SIZE, strong=True)
    rng = np.random.default_rng(0)
    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask[18:40, 12:30] = 1
    image = (np.where(mask[..., None] > 0, (200, 90, 60), (90, 60, 50)) + rng.integers(0, 9, (SIZE, SIZE, 3))).astype(
        np.uint8
    )
    medium_change, strong_change, greys = [], [], 0
    for seed in range(60):
        (a, a_mask), (b, b_mask) = augment(image, mask, seed), strong(image, mask, seed)
        np.testing.assert_array_equal(a_mask, b_mask)
        known = a_mask != 255
        plain = np.where(a_mask[..., None] == 1, image[mask == 1].mean(0), image[mask == 0].mean(0))
        medium_change.append(np.abs(a - plain)[known].mean())
        strong_change.append(np.abs(b - plain)[known].mean())
        greys += int(np.abs(b[..., 0].astype(int) - b[..., 2]).max() <= 2)
        inside, outside = (b[b_mask == k].mean(axis=0) for k in (1, 0))
        assert np.abs(inside - outside).max() > 10, seed
    assert np.mean(strong_change) > 1.5 * np.mean(medium_change)
    assert 4 <= greys <= 24


def test_the_strong_view_keeps_grey_images_grey():
    grey = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 1), dtype=np.uint8).repeat(3, axis=2)
    blank, strong, other = np.zeros((SIZE, SIZE), np.uint8), Augment(SIZE, strong=True), Augment(SIZE, strong=True)
    for seed in range(30):
        image = strong(grey, blank, seed)[0]
        assert np.ptp(image.astype(int), axis=2).max() <= 2, seed
        np.testing.assert_array_equal(image, other(grey, blank, seed)[0])
    copy = pickle.loads(pickle.dumps(strong))
    assert copy.strong and np.array_equal(copy(grey, blank, 3)[0], strong(grey, blank, 3)[0])


def test_geometric_changes_are_the_same_and_keep_colours(augment):
    plain, strong = Augment(SIZE, geometric_only=True), Augment(SIZE, strong=True)
    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask[18:40, 12:30] = 1
    image = np.full((SIZE, SIZE, 3), (200, 90, 60), np.uint8)
    for seed in range(30):
        changed, moved = plain(image, mask, seed)
        for other in (augment, strong, pickle.loads(pickle.dumps(plain))):
            np.testing.assert_array_equal(other(image, mask, seed)[1], moved)
        known = moved != 255
        colours = changed[known].reshape(-1, 3)
        assert np.median(np.abs(colours.astype(int) - (200, 90, 60)).max(axis=1)) == 0, seed
    colours = pickle.loads(pickle.dumps(Augment(SIZE, strong=True, colours_only=True)))
    assert all(np.array_equal(colours(image, mask, seed)[1], mask) for seed in range(10))
    assert any((colours(image, mask, seed)[0] != image).any() for seed in range(3))
    assert pickle.loads(pickle.dumps(plain)).geometric_only and not pickle.loads(pickle.dumps(strong)).geometric_only


def test_a_disabled_augmentation_is_the_identity(pair):
    image, mask = Augment(SIZE, enabled=False)(*pair, 3)
    np.testing.assert_array_equal(image, pair[0])
    np.testing.assert_array_equal(mask, pair[1])


def test_a_pickled_augmentation_gives_the_same_images(augment, pair):
    expected = augment(*pair, 9)
    copy = pickle.loads(pickle.dumps(augment))
    np.testing.assert_array_equal(copy(*pair, 9)[0], expected[0])
    assert (copy.size, copy.enabled) == (SIZE, True)


@pytest.mark.parametrize("wrong", ["shape", "dtype", "mask"])
def test_wrong_arrays_are_refused(augment, pair, wrong):
    image, mask = pair
    arguments = {"shape": (image[:-1], mask), "dtype": (image / 255, mask), "mask": (image, mask[:-1])}[wrong]
    with pytest.raises(ValueError, match="expected"):
        augment(*arguments, 0)


def test_albumentations_is_imported_at_first_use_without_network():
    done = subprocess.run([sys.executable, "-c", NO_NETWORK], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_supersampled_images_are_turned_in_their_fine_pixels_and_then_reduced(pair):
    symmetry = Symmetry("both", 180.0, (1.5, 1.5))
    fine = Augment(SIZE // 2, geometric_only=True, supersample=2, symmetry=symmetry)
    coarse = Augment(SIZE // 2, geometric_only=True, symmetry=symmetry)
    rows, cols = np.mgrid[:SIZE, :SIZE]
    image = np.repeat((2 * (rows + cols)).astype(np.uint8)[..., None], 3, axis=-1)
    mask = (rows + cols > SIZE).astype(np.uint8)
    small = Resizer(SIZE // 2)
    for seed in range(8):
        a, b = fine(image, mask, seed), coarse(small.image(image), small.mask(mask), seed)
        known = (a[1] != 255) & (b[1] != 255)
        assert known.mean() > 0.5 and a[0].shape == (SIZE // 2, SIZE // 2, 3)
        np.testing.assert_allclose(a[0][known].astype(int), b[0][known], atol=6)
        assert (a[1] == b[1])[known].mean() > 0.9, "the same change of geometry"
    unchanged = Augment(SIZE // 2, enabled=False, supersample=2)(image, mask, 0)
    np.testing.assert_array_equal(unchanged[0], small.image(image))
    np.testing.assert_array_equal(unchanged[1], small.mask(mask))


def test_magnification_of_a_supersampled_image_shows_finer_detail():
    noise = np.random.default_rng(3).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    symmetry, blank = Symmetry("none", 0.0, (2.0, 2.0)), np.zeros((SIZE, SIZE), np.uint8)
    fine = Augment(SIZE // 2, geometric_only=True, supersample=2, symmetry=symmetry)
    coarse = Augment(SIZE // 2, geometric_only=True, symmetry=symmetry)
    small = Resizer(SIZE // 2).image(noise)
    views = [(fine(noise, blank, seed)[0], coarse(small, blank[::2, ::2], seed)[0]) for seed in range(20)]
    ratios = [a[8:-8, 8:-8].std() / b[8:-8, 8:-8].std() for a, b in views if not np.array_equal(b, small)]
    assert len(ratios) > 10 and min(ratios) > 1.15

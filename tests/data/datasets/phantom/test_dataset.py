"""The phantom: images determined by kind, index and size; masks and labels agree."""

import numpy as np
import pytest

from kmine.data.datasets.phantom import dataset as phantom
from kmine.data.datasets.phantom.dataset import PhantomSource
from kmine.errors import UserError

KINDS = ("polyp", "ct", "xray")


@pytest.fixture(autouse=True)
def _render_afresh():
    """Clear the cache, so that no test compares an image with itself."""
    phantom._render.cache_clear()


def _pair(kind, index, size=32, num_samples=1000):
    source = PhantomSource(kind, num_samples, size)
    sample_id = source.refs()[index].sample_id
    return source.image(sample_id), source.mask(sample_id)


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_does_not_depend_on_number_and_order(kind):
    few, many = PhantomSource(kind, 6, 48), PhantomSource(kind, 60, 48)
    ids = [ref.sample_id for ref in few.refs()]
    assert ids == [ref.sample_id for ref in many.refs()][:6]
    first = {sample_id: (few.image(sample_id), few.mask(sample_id)) for sample_id in ids}
    phantom._render.cache_clear()
    for sample_id in reversed(ids):
        mask, image = many.mask(sample_id), many.image(sample_id)
        np.testing.assert_array_equal(image, first[sample_id][0])
        np.testing.assert_array_equal(mask, first[sample_id][1])


@pytest.mark.parametrize("kind", KINDS)
def test_global_seeds_are_neither_used_nor_changed(kind):
    np.random.seed(0)  # noqa: NPY002
    image, _ = _pair(kind, 3)
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    phantom._render.cache_clear()
    np.random.seed(1)  # noqa: NPY002
    np.testing.assert_array_equal(_pair(kind, 3)[0], image)
    np.random.seed(0)  # noqa: NPY002
    np.testing.assert_array_equal(np.random.get_state()[1], state)  # noqa: NPY002


@pytest.mark.parametrize("size", [32, 96, 130])
@pytest.mark.parametrize("kind", KINDS)
def test_images_and_masks_have_their_shapes_types_and_values(kind, size):
    for index in range(4):
        image, mask = _pair(kind, index, size)
        assert image.shape == (size, size, 3) and image.dtype == np.uint8
        assert mask.shape == (size, size) and mask.dtype == np.uint8
        assert set(np.unique(mask)) <= {0, 1}
        assert image.std() > 5


@pytest.mark.parametrize("kind", ["ct", "xray"])
def test_ct_and_xray_are_grey(kind):
    image, _ = _pair(kind, 0, 64)
    assert (image == image[..., :1]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_image_label_agrees_with_the_mask(kind):
    source = PhantomSource(kind, 150, 32)
    for ref in source.refs():
        assert ref.image_label == int(source.mask(ref.sample_id).any()), ref.sample_id


@pytest.mark.parametrize(("kind", "low", "high"), [("polyp", 0.0, 0.0), ("ct", 0.35, 0.45), ("xray", 0.35, 0.45)])
def test_the_share_of_lesion_free_images(kind, low, high):
    labels = [ref.image_label for ref in PhantomSource(kind, 2000, 32).refs()]
    assert low <= 1 - np.mean(labels) <= high


@pytest.mark.parametrize("kind", KINDS)
def test_images_differ_widely(kind):
    source = PhantomSource(kind, 24, 32)
    images = np.stack([source.image(ref.sample_id).astype(float) for ref in source.refs()])
    apart = np.abs(images[:, None] - images[None]).mean(axis=(2, 3, 4))
    assert apart[~np.eye(24, dtype=bool)].min() > 5
    areas = np.array([source.mask(ref.sample_id).mean() for ref in source.refs()])
    assert areas[areas > 0].max() > 5 * areas[areas > 0].min()


@pytest.mark.parametrize("kind", KINDS)
def test_lesions_have_plausible_areas(kind):
    source = PhantomSource(kind, 40, 96)
    areas = np.array([source.mask(ref.sample_id).mean() for ref in source.refs() if ref.image_label])
    assert np.median(areas) > 0.01 and areas.max() < 0.6


@pytest.mark.parametrize("kind", KINDS)
def test_a_scene_is_the_same_at_another_size(kind):
    """A large image, halved, has the mask of the small one."""
    indices = [ref for ref in range(12) if PhantomSource(kind, 12, 32).refs()[ref].image_label]
    for index in indices:
        small, large = _pair(kind, index, 96)[1], _pair(kind, index, 192)[1]
        halved = large.reshape(96, 2, 96, 2).mean(axis=(1, 3)) >= 0.5
        overlap = 2 * (halved & (small > 0)).sum() / (halved.sum() + small.sum())
        assert overlap > 0.85, index


def test_names_ids_and_groups_of_the_kinds():
    for kind, name in zip(KINDS, ("polyp", "tumour", "infection"), strict=True):
        source = PhantomSource(kind, 3, 32)
        assert source.name == "phantom" and source.class_names == ("background", name) and source.skipped == ()
        ids = [ref.sample_id for ref in source.refs()]
        assert ids == [f"{kind}_{index:06d}" for index in range(3)] == sorted(ids)
        assert all(ref.group_id == ref.sample_id and ref.has_mask for ref in source.refs())


def test_the_fingerprint_follows_the_settings():
    settings = [("polyp", 4, 32), ("ct", 4, 32), ("polyp", 5, 32), ("polyp", 4, 33)]
    prints = [PhantomSource(*values).fingerprint() for values in settings]
    assert len(set(prints)) == 4
    assert prints[0] == PhantomSource(*settings[0]).fingerprint()


def test_images_are_copies():
    source = PhantomSource("polyp", 1, 32)
    image = source.image("polyp_000000")
    before = image.copy()
    image[:] = 0
    np.testing.assert_array_equal(source.image("polyp_000000"), before)


@pytest.mark.parametrize("sample_id", ["polyp_000003", "ct_000000", "polyp_x", "polyp_-1"])
def test_unknown_ids_are_refused(sample_id):
    with pytest.raises(KeyError, match="no sample"):
        PhantomSource("polyp", 3, 32).image(sample_id)


@pytest.mark.parametrize("settings", [("mri", 3, 32), ("polyp", 0, 32), ("polyp", 3, 16)])
def test_wrong_settings_are_refused(settings):
    with pytest.raises(UserError, match="expected"):
        PhantomSource(*settings)

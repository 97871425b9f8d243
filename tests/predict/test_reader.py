"""Decoded inputs: windowed, resized, with geometry; faults named with the flag that cures them."""

from __future__ import annotations

import os

import numpy as np
import pytest
from helpers.image_files import save_dicom, save_slice
from helpers.nnunet_files import volumes
from PIL import Image

from kmine.config import DataConfig
from kmine.data.datasets.nnunet import Nnunet
from kmine.data.io.nifti_write import encode_mask
from kmine.data.resize import Resizer
from kmine.errors import SampleError
from kmine.predict import reader
from kmine.predict.inputs import Input, find_inputs, inputs_of_channels
from kmine.predict.reader import file_stamps, load


def picture(path, values) -> Input:
    Image.fromarray(values).save(path)
    return Input(path.stem, "picture", (path,))


def test_a_picture_is_resized_and_kept_only_on_request(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    item = picture(tmp_path / "a.png", values)
    loaded = load(item, Resizer(8), None, keep=True)
    assert loaded.shape == (20, 30) and loaded.spacing is loaded.frame is None
    assert np.array_equal(loaded.small[0], Resizer(8).image(values)) and np.array_equal(loaded.native[0], values)
    assert load(item, Resizer(8), None, keep=False).native is None


def test_sixteen_bit_values_are_windowed(tmp_path):
    item = picture(tmp_path / "a.png", np.array([[0, 100, 200, 300]] * 4, np.uint16))
    assert load(item, Resizer(4), (100, 300), keep=True).native[0, 0, :, 0].tolist() == pytest.approx(
        [0, 0, 127.5, 255], abs=1
    )
    with pytest.raises(SampleError, match=r"--window") as caught:
        load(item, Resizer(4), None, keep=False)
    assert "--data.window" not in str(caught.value)


def test_a_nifti_file_needs_a_window(tmp_path):
    import nibabel

    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 4, 2), np.int16), np.eye(4)), tmp_path / "v.nii")
    with pytest.raises(SampleError, match=r"pass --window \[LOW,HIGH\]"):
        load(Input("v", "nifti", (tmp_path / "v.nii",)), Resizer(4), None, keep=False)


@pytest.mark.parametrize(
    ("error", "problem"),
    [(OSError(5, "Input/output error"), r"cannot be read \(Input/output error\)"), (MemoryError(), "crop it")],
)
def test_a_failed_read_is_a_fault_of_the_sample(tmp_path, monkeypatch, error, problem):
    def read(*_):
        raise error

    monkeypatch.setitem(reader._LOADERS, "picture", read)
    with pytest.raises(SampleError, match=problem):
        load(Input("a", "picture", (tmp_path / "a.png",)), Resizer(4), None, keep=False)


def test_stamps_change_with_size_and_time(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"12")
    os.utime(path, ns=(5, 5))
    assert file_stamps(Input("a", "picture", (path,))) == [["a.png", 2, 5]]


@pytest.mark.parametrize("axes", ["RAS", "LPS", "PIR", "SLA"])
def test_masks_of_a_turned_volume_come_back_to_the_voxels_they_are_of(tmp_path, axes):
    import nibabel
    from nibabel.orientations import axcodes2ornt, inv_ornt_aff

    values = np.random.default_rng(0).integers(0, 256, (5, 6, 7)).astype(np.int16)
    affine = inv_ornt_aff(axcodes2ornt(axes), values.shape)
    affine[:3, :3] *= 2
    nibabel.save(nibabel.Nifti1Image(values, affine), tmp_path / "v.nii.gz")
    (one,) = find_inputs([str(tmp_path / "v.nii.gz")], tmp_path / "out").readable
    loaded = load(one, Resizer(8), (0, 255), keep=True)
    # The grey values, taken for a mask, must be the volume.
    (tmp_path / "back.nii.gz").write_bytes(encode_mask(loaded.native, loaded.frame))
    back = nibabel.load(tmp_path / "back.nii.gz")
    assert np.array_equal(np.asarray(back.dataobj), values) and np.array_equal(back.affine, affine)
    assert loaded.frame.thickness == 2


def test_a_localizer_is_named_beside_a_series_and_alone(tmp_path):
    values = np.arange(20).reshape(4, 5)
    for n in range(3):
        save_slice(tmp_path / "ct" / f"{n}.dcm", values, (0, 0, 2.0 * n))
    save_slice(tmp_path / "ct" / "scout.dcm", np.zeros((9, 9)), (0, 0, 0))
    save_slice(tmp_path / "b.dcm", values)
    tags = {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"], "PixelSpacing": [1, 1]}
    save_dicom(tmp_path / "c.dcm", values.astype("<i2"), **tags)
    inputs = find_inputs([str(tmp_path)], tmp_path / "out").readable
    warnings = {item.name: load(item, Resizer(8), (0, 20), keep=False).warning for item in inputs}
    assert warnings == {
        "ct/scout": "an image beside a series, such as its localizer: predicted as a picture",
        "ct": "",
        "b": "",
        "c": "a localizer, not a slice of a scan",
    }


@pytest.mark.parametrize("window", [None, (0.0, 300.0)])
def test_volumes_of_channels_are_read_as_in_training(tmp_path, window):
    source = Nnunet(volumes(tmp_path), DataConfig(name="nnunet", root=str(tmp_path), window=window))
    found = inputs_of_channels(find_inputs([str(tmp_path / "imagesTr")], tmp_path / "out"), {0: "T2", 1: "ADC"})
    assert [item.name for item in found.readable] == ["a", "b", "c"]
    loaded = load(found.readable[1], Resizer(4), window, keep=True)
    images = [source.image(ref.sample_id) for ref in source.refs() if ref.sample_id.startswith("b/")]
    assert np.array_equal(loaded.native, images) and loaded.shape == images[0].shape[:2]
    assert np.array_equal(loaded.small, [Resizer(4).image(image) for image in images])
    (tmp_path / "imagesTr" / "b_0001.nii.gz").write_bytes(b"broken")
    with pytest.raises(SampleError, match="b_0001"):
        load(found.readable[1], Resizer(4), window, keep=True)

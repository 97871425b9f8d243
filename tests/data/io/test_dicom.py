"""DICOM files: windows by hand, colour, and one error for each misfit."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.image_files import colour_noise, save_dicom, save_slice, square

from kmine.data.io.dicom import read_dicom, read_header, read_slice_position
from kmine.errors import SampleError

ROW = np.array([[-100, 0, 50, 99, 199, 200]], np.int16)


@pytest.fixture
def first_row(tmp_path):
    """Grey values of the first row of a file."""

    def read(values=ROW, window=None, **tags) -> list[int]:
        return read_dicom(save_dicom(tmp_path / "a.dcm", values, **tags), window)[0, :, 0].tolist()

    return read


def test_windows_by_hand(first_row):
    # stored v: 2 v - 100; window 0 to 100: v = 50 is black, 75 in the middle, 100 white
    tags = {"RescaleSlope": 2, "RescaleIntercept": -100}
    assert first_row(np.array([[0, 50, 60, 100, 900]], np.uint16), (0.0, 100.0), **tags) == [0, 0, 51, 255, 255]
    # center 100, width 200: black at 0, white at 100 + 100 - 1 = 199; 50 / 199 * 255 = 64.07, 99 / 199 * 255 = 126.86
    own = {"WindowCenter": 100, "WindowWidth": 200}
    assert first_row(**own) == [0, 0, 64, 127, 255, 255]
    assert first_row(WindowCenter=[100, 5], WindowWidth=[200, 7]) == [0, 0, 64, 127, 255, 255]
    # exact: white at 200; 50 / 200 * 255 = 63.75, 99 / 200 * 255 = 126.2, 199 / 200 * 255 = 253.7
    assert first_row(**own, VOILUTFunction="LINEAR_EXACT") == [0, 0, 64, 126, 254, 255]
    assert first_row(**own, PhotometricInterpretation="MONOCHROME1") == [255, 255, 191, 128, 0, 0]
    assert first_row(window=(-100.0, 155.0), **own)[:3] == [0, 100, 150], "data.window takes precedence"


def test_without_a_window_only_8_bits_are_read(first_row):
    with pytest.raises(SampleError, match=r"without WindowCenter .*values -100 to 200\); .*--data.window"):
        first_row()
    assert first_row(np.array([[0, 7, 255, 9]], np.uint8)) == [0, 7, 255, 9]
    with pytest.raises(SampleError, match="got SIGMOID"):
        first_row(WindowCenter=0, WindowWidth=9, VOILUTFunction="SIGMOID")
    with pytest.raises(SampleError, match="of width 1;"):
        first_row(WindowCenter=0, WindowWidth=1)


def test_colour_is_read_and_unsuitable_files_are_refused(first_row):
    assert first_row(colour_noise()) == colour_noise()[0, :, 0].tolist()
    with pytest.raises(SampleError, match="got YBR_FULL"):
        first_row(colour_noise(), PhotometricInterpretation="YBR_FULL")
    with pytest.raises(SampleError, match="of one frame, got 2"):
        first_row(NumberOfFrames=2)
    with pytest.raises(SampleError, match="expected a whole DICOM file"):
        first_row(PixelData=b"\0\0", WindowCenter=0, WindowWidth=9)


def test_the_header_holds_shape_series_spacing_and_position(tmp_path):
    path = save_slice(tmp_path / "a.dcm", square(), position=(1, 2, 3), series="1.2")
    header = read_header(path)
    assert (header.shape, header.series, header.spacing) == ((8, 10), "1.2", (0.5, 0.25))
    position = read_slice_position(path)
    assert (position.series, position.position, position.orientation) == ("1.2", (1, 2, 3), (1, 0, 0, 0, 1, 0))
    assert read_slice_position(save_slice(tmp_path / "b.dcm", square())) is None

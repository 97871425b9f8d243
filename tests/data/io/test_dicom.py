"""DICOM files: windows by hand, colour, and one error for each misfit."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import pytest
from helpers.dicom_files import multiframe
from helpers.image_files import colour_noise, dicom_dataset, save_dicom, save_slice, square
from PIL import Image
from pydicom import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import ImplicitVRLittleEndian, JPEG2000Lossless, JPEGBaseline8Bit, JPEGExtended12Bit, JPEGLosslessSV1

from kmine.data.io.dicom import J2K_START, _frame_size, read_dicom, read_header, read_positions, read_slice_position
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
    with pytest.raises(SampleError, match="or 8-bit colour, got HSV of 8 bits"):
        first_row(colour_noise(), PhotometricInterpretation="HSV")
    with pytest.raises(SampleError, match="or 8-bit colour, got RGB of 16 bits"):
        first_row(colour_noise().astype(np.uint16))
    with pytest.raises(SampleError, match="expected 1 to 8,192 frames, got 8193"):
        first_row(NumberOfFrames=8193)
    with pytest.raises(SampleError, match="expected a whole DICOM file"):
        first_row(NumberOfFrames=2, WindowCenter=0, WindowWidth=9)
    with pytest.raises(SampleError, match="expected a whole DICOM file"):
        first_row(PixelData=b"\0\0", WindowCenter=0, WindowWidth=9)


def test_the_header_holds_shape_series_spacing_and_position(tmp_path):
    path = save_slice(tmp_path / "a.dcm", square(), position=(1, 2, 3), series="1.2")
    header = read_header(path)
    assert (header.shape, header.series, header.spacing) == ((8, 10), "1.2", (0.5, 0.25))
    position = read_slice_position(path)
    assert (position.series, position.position, position.orientation) == ("1.2", (1, 2, 3), (1, 0, 0, 0, 1, 0))
    assert read_slice_position(save_slice(tmp_path / "b.dcm", square())) is None


def item(**fields) -> Dataset:
    """Item of a sequence."""
    data = Dataset()
    for name, value in fields.items():
        setattr(data, name, value)
    if isinstance(fields.get("LUTData"), bytes):
        data["LUTData"].VR = "OW"
    return data


def table(values, first=0, bits=16) -> list[Dataset]:
    """A look-up table of 16-bit entries."""
    return [item(LUTDescriptor=[len(values), first, bits], LUTData=np.array(values, "<u2").tobytes())]


def test_look_up_tables_are_applied_before_the_window(first_row):
    values = np.array([[0, 1, 2, 9]], np.uint8)
    # entries of 0, 1 and 2; larger values take the last: 0, 100, 400, 400 of a window from 0 to 400
    modality = {"ModalityLUTSequence": table([0, 100, 400])}
    assert first_row(values, (0.0, 400.0), **modality) == [0, 64, 255, 255]
    assert first_row(values, WindowCenter=200, WindowWidth=401, **modality) == [0, 64, 255, 255]
    with pytest.raises(SampleError, match=r"values 0 to 400\); .*--data.window"):
        first_row(values, **modality)
    # without a window the second table: 10 bits, so that 1023 is white; 341 / 1023 * 255 = 85
    assert first_row(values, VOILUTSequence=table([1023, 341, 0], bits=10)) == [255, 85, 0, 0]
    signed = {"VOILUTSequence": table([0, 341, 1023], first=-100, bits=10), "RescaleIntercept": "-100"}
    assert first_row(np.array([[-9, 0, 1, 2]], np.int16), **signed) == [0, 0, 85, 255]
    short = item(LUTDescriptor=[9, 0, 16], LUTData=bytes(8))
    with pytest.raises(SampleError, match="a look-up table of 8 entries for 9"):
        first_row(values, (0.0, 1.0), ModalityLUTSequence=[short])


def test_an_enhanced_file_keeps_its_fields_in_functional_groups(first_row, tmp_path):
    scale = item(PixelValueTransformationSequence=[item(RescaleSlope="2", RescaleIntercept="-100")])
    frame = item(
        FrameVOILUTSequence=[item(WindowCenter="100", WindowWidth="201")],
        PixelMeasuresSequence=[item(PixelSpacing=["0.5", "0.25"])],
    )
    groups = {"SharedFunctionalGroupsSequence": [scale], "PerFrameFunctionalGroupsSequence": [frame]}
    # 2 v - 100: -100 to 300; black at -0.5, white at 199.5
    assert first_row(np.array([[0, 50, 100, 200]], np.uint16), **groups) == [0, 1, 128, 255]
    assert read_header(tmp_path / "a.dcm").spacing == (0.5, 0.25)


def test_an_empty_field_is_an_absent_one(first_row):
    empty = {
        "RescaleSlope": None,
        "RescaleIntercept": "",
        "WindowCenter": None,
        "WindowWidth": "",
        "PixelSpacing": None,
    }
    assert first_row(np.array([[0, 7, 255, 9]], np.uint8), **empty) == [0, 7, 255, 9]


def test_colour_of_cameras_and_ultrasound_is_read_as_rgb(tmp_path):
    # full-range luma and chroma of grey 50, red and blue
    luma = np.array([[[50, 128, 128], [76, 85, 255], [29, 255, 107], [0, 128, 128]]], np.uint8)
    path = save_dicom(tmp_path / "a.dcm", luma, PhotometricInterpretation="YBR_FULL")
    np.testing.assert_allclose(read_dicom(path, None)[0], [[50] * 3, [254, 0, 0], [0, 0, 254], [0] * 3], atol=2)
    palette = {
        f"{name}PaletteColorLookupTable{what}": value
        for name, entries in {"Red": [1, 255], "Green": [2, 254], "Blue": [3, 253]}.items()
        for what, value in {"Descriptor": [2, 0, 16], "Data": (np.array(entries, "<u2") << 8).tobytes()}.items()
    }
    values = np.array([[0, 1]], np.uint8)
    path = save_dicom(tmp_path / "b.dcm", values, PhotometricInterpretation="PALETTE COLOR", **palette)
    assert read_dicom(path, None).tolist() == [[[1, 2, 3], [255, 254, 253]]]


def compressed(path: Path, values: np.ndarray, frame: bytes, syntax: str, **tags) -> Path:
    data = dicom_dataset(values, **tags)
    data.file_meta.TransferSyntaxUID, data.PixelData = syntax, encapsulate([frame])
    data["PixelData"].VR = "OB"
    data.save_as(path, enforce_file_format=True)
    return path


def encoded(image: np.ndarray, kind: str, **options) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image).save(out, kind, **options)
    return out.getvalue()


def test_compressed_frames_are_read_if_a_decoder_is_there_and_else_named(tmp_path):
    image = np.full((8, 10, 3), (200, 60, 60), np.uint8)
    jpeg = encoded(image, "JPEG", quality=95)
    tags = {"PhotometricInterpretation": "YBR_FULL_422"}
    path = compressed(tmp_path / "a.dcm", image, jpeg, JPEGBaseline8Bit, **tags)
    np.testing.assert_allclose(read_dicom(path, None).astype(int), image, atol=4)
    deep = np.arange(80, dtype=np.uint16).reshape(8, 10) * 50
    path = compressed(tmp_path / "b.dcm", deep, encoded(deep, "JPEG2000", no_jp2=True), JPEG2000Lossless)
    assert read_dicom(path, (0.0, 3950.0))[0, :2, 0].tolist() == [0, 3]
    for syntax, start in ((JPEGExtended12Bit, 0xC1), (JPEGLosslessSV1, 0xC3)):
        # start of image and of frame: 12 bits, 8 x 10, one component
        frame = b"\xff\xd8\xff" + bytes((start, 0, 11, 12, 0, 8, 0, 10, 1, 1, 17, 0)) + b"\xff\xd9"
        path = compressed(tmp_path / "c.dcm", deep, frame, syntax, BitsStored=12, HighBit=11)
        with pytest.raises(SampleError, match=r"got JPEG (Extended|Lossless).*pylibjpeg.*gdcmconv --raw") as caught:
            read_dicom(path, (0.0, 1.0))
        assert "0x" not in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(SampleError, match="a frame of 10 x 8, expected 5 x 4"):
        read_dicom(compressed(tmp_path / "d.dcm", image[:4, :5], jpeg, JPEGBaseline8Bit, **tags), None)
    with pytest.raises(SampleError, match="a frame without a size"):
        read_dicom(compressed(tmp_path / "d.dcm", image, b"\xff\xd8\xff\xff", JPEGBaseline8Bit, **tags), None)


@pytest.mark.parametrize("implicit", [False, True])
def test_a_file_without_preamble_or_meta_header_is_read(tmp_path, implicit):
    data = dicom_dataset(square(7))
    if implicit:
        data.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    whole = io.BytesIO()
    data.save_as(whole, enforce_file_format=True)
    bare = io.BytesIO()
    data.save_as(bare, enforce_file_format=False)
    (tmp_path / "a.dcm").write_bytes(whole.getvalue()[132:])
    meta = data.file_meta
    del data.file_meta
    data.save_as(bare := io.BytesIO(), implicit_vr=meta.TransferSyntaxUID == ImplicitVRLittleEndian, little_endian=True)
    (tmp_path / "b.dcm").write_bytes(bare.getvalue())
    for name in ("a.dcm", "b.dcm"):
        np.testing.assert_array_equal(read_dicom(tmp_path / name, None)[..., 0], square(7))
    (tmp_path / "c.dcm").write_bytes(encoded(colour_noise(), "PNG"))
    with pytest.raises(SampleError, match="expected a DICOM file, got a PNG picture; rename it"):
        read_dicom(tmp_path / "c.dcm", None)


def test_the_size_of_a_jpeg_2000_frame_is_found_behind_long_boxes():
    codestream = J2K_START + struct.pack(">HH4I", 41, 0, 405, 302, 5, 2)
    assert _frame_size(codestream) == _frame_size(b"\0\0\0\x0cjP  " + bytes(5000) + codestream) == (300, 400)


def test_frames_of_one_file_are_read_one_by_one(tmp_path):
    path = multiframe(tmp_path / "a.dcm", 3)
    assert read_header(path).frames == 3
    assert [int(read_dicom(path, (0, 20), frame)[0, 0, 0]) for frame in (2, 0, 1)] == [255, 0, 128]
    assert [place.position for place in read_positions(path, 3)] == [(0, 0, 0), (0, 0, 2), (0, 0, 4)]

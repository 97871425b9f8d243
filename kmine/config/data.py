"""Settings of the data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from kmine.config.checks import LocalPath, expand_paths, fraction, is_count, is_range, require

PhantomKind = Literal["polyp", "ct", "xray"]
COVID_CLASSES = ("COVID-19", "Non-COVID", "Normal")


@dataclass(frozen=True)
class DataConfig:
    """Data set, splits, and reading of images."""

    name: str = "phantom"
    """Data set: phantom (procedural, no files needed), kvasir_seg, lits, covid_qu_ex, or your own files: folder, or
    nnunet: a data set in nnU-Net's layout."""
    root: LocalPath | None = None
    """Folder of the data set as downloaded, of nnunet that of dataset.json; not used by phantom and folder."""
    channels: tuple[int, ...] | None = None
    """nnunet only: numbers of one to three channels, as in [0,2], that become the colours; default: all."""
    images: LocalPath | None = None
    """Folder only: your images, in sub-folders or not: PNG, JPEG, TIFF, BMP, GIF, DICOM (.dcm, or no suffix)
    or NIfTI (.nii, .nii.gz)."""
    masks: LocalPath | None = None
    """Folder only: masks of the same names (suffixes apart), for some or all of the images."""
    mask_suffix: str | None = None
    """Folder only: end of the masks' names, as _mask for the mask a_mask.png of the image a.jpg; masks may then lie
    beside the images, without data.masks. Further masks of an image (a_mask_1.png) are united with the first."""
    csv: LocalPath | None = None
    """Folder only, instead of images and masks: CSV of image,mask,group,label,split, paths relative to its own folder.
    Only image is required. group: patient or volume; label: 0 (free of the last class, the lesion) or 1; split: train,
    val or test."""
    class_names: tuple[str, ...] = ("background", "object")
    """Folder only: names by class id. Two: masks of 0 and 255, or 0 and 1. More: pixels are ids, 255 is ignored."""
    kind: PhantomKind = "polyp"
    """Phantom only: modality of the procedural images."""
    num_samples: int = 400
    """Phantom only: number of images."""
    task: Literal["auto", "tumour", "liver", "both", "lung", "infection"] = "auto"
    """Target. LiTS: tumour (auto), liver (with its tumours), both (two classes, liver beside tumour);
    COVID-QU-Ex: infection (auto), lung. The other data sets have one task."""
    classes: tuple[str, ...] = COVID_CLASSES
    """COVID-QU-Ex only: class folders to read."""
    slices: Literal["all", "liver"] = "all"
    """LiTS only: all axial slices, or those that show liver (by the mask, or those that image_labels lists)."""
    every_nth: int = 1
    """LiTS, and NIfTI files of folder: use only slices 0, n, 2n, ... of each volume."""
    window: tuple[float, float] | None = None
    """Stored values (in CT Hounsfield units) shown as black and as white, as in [-160, 240]; the same for every image.
    LiTS: [-160, 240] if not given. Folder: needed for NIfTI and 16-bit images; DICOM files may bring their own.
    nnunet: needed for CT; other NIfTI channels are otherwise windowed from the 0.5th to the 99.5th percentile."""
    image_labels: LocalPath | None = None
    """LiTS only: CSV of sample_id,label (0: lesion-free, 1: lesion). Masks of volumes listed there are not opened."""
    normal_images: LocalPath | None = None
    """Kvasir-SEG only: folder of images without a polyp; added as unlabeled images with image label 0."""
    size: int = 96
    """Side in pixels of the local model's square input; images are resized, metrics use the native frame."""
    resize: Literal["squash", "letterbox"] = "squash"
    """squash: the image fills the square; letterbox: it keeps the ratio of its sides, and the rest is black and
    ignored."""
    patch: int | None = None
    """For objects that would vanish in a small image: the network sees squares of this side, cut out of the resized
    image of side size: at random in training, half of them around an object, in prediction all of them, overlapping.
    Default: the whole image. Not for sks, and such models are not exported."""
    mask_resize: Literal["area", "nearest"] = "area"
    """How masks are shrunk to that size: the class that covers most of each pixel, or that of its nearest pixel."""
    label_fraction: float = 0.05
    """Share of the training images whose masks are used; nested: the images of 0.1 are part of those of 0.25."""
    fine_groups: float | None = None
    """Instead of label_fraction: number of labeled training groups (volumes), or below 1 their share. All other
    training images keep only their image-level label."""
    val_fraction: float = 0.1
    """Share of the images with masks used for validation."""
    test_fraction: float = 0.25
    """Share of the images with masks held out as test split; not used with data.folds."""
    folds: int | None = None
    """For few masks: kmine loop divides the images with masks into so many folds and makes a run for each, with that
    fold as test split (fold-0, fold-1, ... in the folder out), and one on all masks without test split (all), whose
    model is the one to use. kmine compare then tests on every image with a mask once. As in 5; default: one run."""
    fold: int | None = None
    """One run of data.folds alone: number of its fold, from 0; or data.folds itself: no fold is held out."""
    split_seed: int = 0
    """Seed of validation and test split; `--seed` draws the labeled images, so all seeds share one test split."""
    split_file: LocalPath | None = None
    """A given split: splits.csv of an earlier run (used as it is, labeled images included; label_fraction and
    fine_groups do not apply); a table of sample_id,split (train, val or test); or a folder of id lists train.txt,
    val.txt, test.txt, or such files separated by commas. Tables and lists: a missing val or test is drawn from train.
    Images not named are train if no train list is given, otherwise unused. An id may be that of a group (a volume)."""
    duplicate_distance: int = 6
    """Images whose 64-bit perceptual hashes differ in at most this many bits form one group; -1: off. Finds re-exported
    images, not images of the same patient."""
    allow_leaks: bool = False
    """Report duplicates and groups across splits as notes instead of faults."""
    on_fault: Literal["stop", "say"] = "stop"
    """Faults found in the data before training (empty, inverted or mismatched masks): stop, or say (report and go on).
    kmine.check finds more."""
    on_error: Literal["stop", "skip"] = "stop"
    """Damaged files: stop with one error, or skip them, counted and listed in run.json."""
    cache_dir: LocalPath | None = None
    """Folder of decoded images, shared by runs; default: $KMINE_CACHE, else ~/.cache/kmine."""

    def __post_init__(self) -> None:
        expand_paths(self)
        require(self.root != "", "data.root", "a folder", self.root)
        require(self.num_samples >= 1, "data.num_samples", "at least 1", self.num_samples)
        require(32 <= self.size <= 4096, "data.size", "32 to 4096 pixels", self.size)
        require(self.every_nth >= 1, "data.every_nth", "at least 1", self.every_nth)
        window = self.window
        require(window is None or is_range(window), "data.window", "two rising numbers, black and white", window)
        for name in ("images", "masks", "csv"):
            require(getattr(self, name) != "", f"data.{name}", "a CSV file" if name == "csv" else "a folder", "")
        suffix = self.mask_suffix
        is_valid = suffix is None or (suffix.strip() != "" and "/" not in suffix)
        require(is_valid, "data.mask_suffix", "the end of the masks' names, as _mask", suffix)
        are_valid = self.channels is None or (
            0 < len({*self.channels}) == len(self.channels) and min(self.channels) >= 0
        )
        require(are_valid, "data.channels", "numbers of channels, each once, as in [0,2]", self.channels)
        names = self.class_names
        are_valid = 2 <= len(names) <= 255 and names[0] == "background" and len({*names, ""}) == len(names) + 1
        expected = "background and at least one class more, each named once, as in [background, polyp]"
        require(are_valid, "data.class_names", expected, names)
        is_patch = self.patch is None or 32 <= self.patch <= self.size
        require(is_patch, "data.patch", f"32 to data.size ({self.size}), or null", self.patch)
        require(self.image_labels != "", "data.image_labels", "a CSV file", self.image_labels)
        require(self.split_file != "", "data.split_file", "a file or a folder of lists", self.split_file)
        require(self.normal_images != "", "data.normal_images", "a folder", self.normal_images)
        are_valid = set(self.classes) <= set(COVID_CLASSES) and 0 < len(self.classes) == len(set(self.classes))
        require(are_valid, "data.classes", f"some of {', '.join(COVID_CLASSES)}, each once", self.classes)
        groups, expected = self.fine_groups, "a whole number of groups from 1, or a share between 0 and 1"
        require(groups is None or 0 < groups < 1 or is_count(groups), "data.fine_groups", expected, groups)
        fraction(self.label_fraction, "data.label_fraction")
        for name in ("val_fraction", "test_fraction"):
            require(0 <= getattr(self, name) < 1, f"data.{name}", "a fraction in [0, 1)", getattr(self, name))
        held_out, expected = self.val_fraction + self.test_fraction, "less than 1, so that training images remain"
        require(held_out < 1, "data.val_fraction + data.test_fraction", expected, held_out)
        folds, fold, none = self.folds, self.fold, "null without data.folds"
        require(folds is None or 2 <= folds <= 50, "data.folds", "2 to 50, or null", folds)
        require(fold is None or folds is not None, "data.fold", none, fold)
        require(fold is None or 0 <= fold <= folds, "data.fold", f"0 to data.folds ({folds})", fold)
        require(folds is None or self.split_file is None, "data.split_file", "null with data.folds", self.split_file)
        bits = self.duplicate_distance
        require(-1 <= bits <= 63, "data.duplicate_distance", "-1 to 63 bits", bits)

    @property
    def num_runs(self) -> int:
        """Runs that `kmine loop` makes: one, or those of all folds and one on all masks."""
        return self.folds + 1 if self.folds and self.fold is None else 1

    def of_all_masks(self) -> DataConfig:
        """The settings of the run on all masks; without folds, or of a single one, unchanged."""
        return replace(self, fold=self.folds) if self.num_runs > 1 else self

"""What a run's data held when it began (contents.csv), compared when the data are opened again."""

from __future__ import annotations

from collections.abc import Collection

from kmine.data.cache.sample_cache import SampleCache
from kmine.data.source import Source
from kmine.errors import UserError, first_names
from kmine.store.run_folder import RunFolder

CONTENTS = "contents.csv"
COLUMNS = ("sample_id", "image_crc32", "mask_crc32")


def record_contents(cache: SampleCache, run: RunFolder, with_masks: Collection[str]) -> None:
    """Write contents.csv: checksums of all images and of the masks of the samples `with_masks`, at training size.

    Checksums of other masks, recorded before, stay.
    """
    masks = {row["sample_id"]: row["mask_crc32"] for row in run.read_csv(CONTENTS) or ()}
    rows = cache.checksums(with_masks).items()
    run.write_csv(
        CONTENTS, COLUMNS, [(i, image, masks.get(i, "") if mask is None else mask) for i, (image, mask) in rows]
    )


def refuse_changed_data(source: Source, cache: SampleCache, run: RunFolder, with_masks: Collection[str]) -> None:
    """Raise `UserError` if images, or masks of the samples `with_masks`, are not those that the run recorded.

    Sizes and times of all files are compared first, contents only where these differ. The masks of test images are
    recorded when they are first opened. A run without contents.csv, of an older version, is not checked.
    """
    stored = run.read_csv(CONTENTS)
    if stored is None or run.run().get("data_fingerprint") == source.fingerprint():
        return
    before = {row["sample_id"]: (row["image_crc32"], row["mask_crc32"]) for row in stored}
    now = _checksums(cache, with_masks)
    changed = sorted(i for i in before.keys() | now.keys() if not _is_same(before.get(i), now.get(i)))
    if changed:
        raise UserError(
            f"{run.root}: expected the data that this run was made from; {len(changed)} of {len(before)} samples have "
            f"another content: {first_names(changed)}; restore their files, or name the folder that holds them "
            "(--data_root; of kmine.loop the data settings with another --out)"
        )


def _checksums(cache: SampleCache, with_masks: Collection[str]) -> dict[str, tuple[str, str]]:
    """Image and mask (empty where it was not read) by id, as contents.csv holds them."""
    rows = cache.checksums(with_masks).items()
    return {i: (str(image), "" if mask is None else str(mask)) for i, (image, mask) in rows}


def _is_same(before: tuple[str, str] | None, now: tuple[str, str] | None) -> bool:
    """Equal images, and equal masks where both were read."""
    if before is None or now is None:
        return False
    return before[0] == now[0] and ("" in (before[1], now[1]) or before[1] == now[1])

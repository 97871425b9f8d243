"""Seeds depend on their keys alone, and on each of them."""

from __future__ import annotations

import subprocess
import sys

from kmine.ops.seeding import derive_seed


def test_equal_keys_give_equal_seeds_in_every_process():
    program = "from kmine.ops.seeding import derive_seed; print(derive_seed(0, 1, 'images'))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) == derive_seed(0, 1, "images")


def test_each_key_its_type_and_its_place_count():
    keys = [(0, 1), (1, 0), (0,), (0, 1, 2), ("0", 1), (0, "1"), ("0\x1f1",)]
    assert len({derive_seed(*key) for key in keys}) == len(keys)


def test_seeds_fit_into_63_bits():
    assert all(0 <= derive_seed(n) < 2**63 for n in range(1000))

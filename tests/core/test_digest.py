from pathlib import Path

import numpy as np
import pytest

from medssl_cli.core.digest import file_digest


@pytest.mark.parametrize(
    ("content", "expected"),
    [  # examples of FIPS 180-2, appendix B
        (b"", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"),
        (b"abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"),
        (b"a" * 1_000_000, "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"),
    ],
)
def test_published_digests(tmp_path: Path, content: bytes, expected: str) -> None:
    (tmp_path / "file").write_bytes(content)
    assert file_digest(tmp_path / "file") == expected


def test_every_block_counts(tmp_path: Path) -> None:
    data = np.zeros(9 << 20, np.uint8)
    seen = set()
    for changed in (None, 0, 5 << 20, (9 << 20) - 1):
        data[:] = 0
        if changed is not None:
            data[changed] = 1
        (tmp_path / "file").write_bytes(data.tobytes())
        seen.add(file_digest(tmp_path / "file"))
    assert len(seen) == 4

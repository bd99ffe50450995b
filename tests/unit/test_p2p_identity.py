"""The peer's key file: made 0600, kept, refused when others can use it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from gpumarket.core.errors import ConfigError, KeyFileExposed
from gpumarket.p2p.identity import load_or_create_seed

SEED, OTHER = b"\x01" * 32, b"\x02" * 32


def test_identity_missing_file_is_created_readable_by_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "p2p" / "identity.key"
    before = os.umask(0)
    try:
        assert load_or_create_seed(path, SEED) == SEED
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(path.parent.iterdir()) == [path]


def test_identity_existing_file_wins_over_a_fresh_seed(tmp_path: Path) -> None:
    load_or_create_seed(tmp_path / "key", SEED)
    assert load_or_create_seed(tmp_path / "key", OTHER) == SEED


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o620, 0o601])
def test_identity_that_others_can_use_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "key"
    load_or_create_seed(path, SEED)
    path.chmod(mode)
    with pytest.raises(KeyFileExposed, match=f"{mode:04o}") as caught:
        load_or_create_seed(path, OTHER)
    assert caught.value.hint == f"chmod 600 {path}"


@pytest.mark.parametrize("content", ["", "abc", "zz" * 32, "01" * 31, "01" * 33])
def test_identity_file_without_a_seed_is_refused_and_kept(tmp_path: Path, content: str) -> None:
    path = tmp_path / "key"
    path.touch(0o600)
    path.write_text(content)
    with pytest.raises(ConfigError, match="not a p2p identity") as caught:
        load_or_create_seed(path, SEED)
    assert path.read_text() == content
    assert not content or content not in str(caught.value)


def test_identity_behind_a_symbolic_link_is_refused(tmp_path: Path) -> None:
    load_or_create_seed(tmp_path / "real", SEED)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(ConfigError):
        load_or_create_seed(tmp_path / "link", OTHER)


def test_identity_that_is_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        load_or_create_seed(tmp_path, SEED)


def test_identity_that_is_a_pipe_is_refused_without_waiting_for_a_writer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "key", 0o600)
    with pytest.raises(ConfigError, match="regular file"):
        load_or_create_seed(tmp_path / "key", SEED)

"""What a testnet consists of: cheaters by kind, and that each kind is known wherever kinds are named."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpumarket.cli.main import run
from gpumarket.testnet import cheaters, plan


def test_every_cheat_has_words_parts_and_a_line_in_the_docs() -> None:
    assert set(plan.CHEATS) == set(cheaters.KINDS)
    page = (Path(__file__).resolve().parents[2] / "docs" / "cheats.md").read_text("utf-8")
    assert all(f"| `{kind}` |" in page for kind in cheaters.KINDS)


def test_cheaters_are_named_after_what_they_do_unless_there_is_one() -> None:
    assert [seller.name for seller in plan.cheaters(["silence"])] == ["cheater"]
    assert [(seller.name, seller.cheat) for seller in plan.cheaters(["silence", "cut-prompt", "silence"])] == [
        ("silence", "silence"),
        ("cut-prompt", "cut-prompt"),
    ]
    assert plan.cheaters([]) == ()


def test_cheater_with_anothers_offer_is_not_waited_for() -> None:
    assert [kind for kind in plan.CHEATS if not plan.cheater(kind=kind).matchable] == ["copied-offer"]


def test_cheater_of_an_unknown_kind_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="no cheat 'kindness'"):
        plan.cheater(kind="kindness")
    assert run(["testnet", "up", "-o", "json", "--cheater", "kindness", "--dir", str(tmp_path / "net")]) == 3
    assert "no cheat 'kindness'" in capsys.readouterr().out
    assert not (tmp_path / "net").exists()


def test_command_line_names_every_cheat(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["testnet", "up", "--help"]) == 0
    told = "".join(capsys.readouterr().out.split())  # lines may break at a hyphen
    assert [kind for kind in plan.CHEATS if kind not in told] == []

"""Decisions are numbered, dated, and lead to the code that follows them."""

from __future__ import annotations

import datetime
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "decisions.md").read_text()
HEADING = re.compile(r"^## (\d+)\. (.+)\n(\d{4}-\d\d-\d\d) · (.+)\n\n(?=\S)", re.MULTILINE)


def test_every_decision_has_a_number_a_date_and_code() -> None:
    assert len(HEADING.findall(PAGE)) == len(re.findall(r"^## ", PAGE, re.MULTILINE)) > 30


def test_numbers_go_up_by_one_and_dates_do_not_go_back() -> None:
    found = HEADING.findall(PAGE)
    assert [int(number) for number, *_ in found] == list(range(1, len(found) + 1))
    dates = [datetime.date.fromisoformat(date) for _, _, date, _ in found]
    assert dates == sorted(dates)


def test_the_code_of_every_decision_is_there() -> None:
    named = [name for *_, code in HEADING.findall(PAGE) for name in re.findall(r"`(.+?)`", code)]
    assert [name for name in named if not (ROOT / name).exists()] == []

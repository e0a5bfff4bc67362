"""The table of errors: what the software raises is in it, and what is in it the software can say."""

import re
from pathlib import Path

from dugnad.peer.codes import CODES, table

ROOT = Path(__file__).parents[2]
FOLDERS = ("peer", "coordinator", "optim", "dht", "configs", "monitoring")
_CODE = re.compile(r"\b[EW][1-9]\d{2}\b")


def test_the_table_in_the_docs_is_the_one_that_the_registry_makes() -> None:
    assert (ROOT / "docs" / "errors.md").read_text("utf-8") == table(), "python -m dugnad.peer.codes > docs/errors.md"


def test_every_code_that_the_software_says_is_in_the_registry_and_the_other_way_round() -> None:
    sources = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py") if path.name != "codes.py"]
    said = {code for path in sources for code in _CODE.findall(path.read_text("utf-8"))}
    assert said == set(CODES)


def test_each_error_has_one_cause_and_one_fix_in_whole_sentences() -> None:
    for code, one in CODES.items():
        assert _CODE.fullmatch(code)
        for text in (one.cause, one.fix):
            assert text.endswith("."), code
            assert "|" not in text, f"{code} would break the table"
    assert list(CODES) == sorted(CODES)
    assert len({one.title for one in CODES.values()}) == len(CODES)

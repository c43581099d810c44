"""Documents: every link leads somewhere, and the README keeps to what a reader can take in."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
MAX_README_LINES = 150

_CODE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.+?)\s*$", re.MULTILINE)
_FILE = re.compile(r"`((?:docs|benchmarks|specmoe_compile|tests)/[\w./-]+\.\w+)`")
# Seven or more hexadecimal digits, some of them letters and some not.
_COMMIT = re.compile(r"\b(?=[0-9a-f]*[a-f])(?=[0-9a-f]*[0-9])[0-9a-f]{7,40}\b")


def anchors(text: str) -> set[str]:
    """The names that links can give to the headings of a page, as GitHub makes them."""
    found: set[str] = set()
    for heading in _HEADING.findall(_CODE.sub("", text)):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        name = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        numbered = (f"{name}-{n}" for n in range(1, len(found) + 2))
        found.add(name if name not in found else next(n for n in numbered if n not in found))
    return found


def dead_links(page: Path, root: Path = ROOT) -> list[str]:
    """Links of a page, and files of the repository that it names, that lead nowhere."""
    text = _CODE.sub("", page.read_text(encoding="utf-8"))
    dead = [name for name in _FILE.findall(text) if not (root / name).is_file()]
    for link in _LINK.findall(text):
        if "://" in link or link.startswith("mailto:"):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (
            anchor and anchor not in anchors(target.read_text(encoding="utf-8"))
        ):
            dead.append(link)
    return dead


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_leads_somewhere(page: Path) -> None:
    assert dead_links(page) == []


def test_a_dead_link_is_seen(tmp_path: Path) -> None:
    (tmp_path / "there.md").write_text("# One `two`, three\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[a](there.md) [b](there.md#one-two-three) [c](there.md#four) [d](gone.md) [e](#five)\n"
        "`docs/gone.md` [f](https://example.org/x)\n```\n[g](gone.md)\n```\n"
    )
    assert dead_links(page, tmp_path) == ["docs/gone.md", "there.md#four", "gone.md", "#five"]


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached: set[Path] = set()
    new = {ROOT / "README.md"}
    while new:
        page = new.pop()
        reached.add(page)
        for link in _LINK.findall(page.read_text(encoding="utf-8")):
            target = (page.parent / link.partition("#")[0]).resolve()
            if target in DOCUMENTS and target not in reached:
                new.add(target)
    assert set(DOCUMENTS) == reached


def test_the_readme_is_short_and_names_no_commits() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_README_LINES
    assert _COMMIT.findall(text) == []

"""Checks the relative links and anchors of Markdown files: file, line, and what is wrong.

Usage: ``python tools/check_links.py [FILE_OR_FOLDER ...]``
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

CODE = re.compile(r"(`+)(?!`).*?(?<!`)\1(?!`)")
# The second half of an inline link, with or without a title, and a reference: [name]: target.
LINK = re.compile(r"\]\(<?([^)\s>]+)>?(?:\s+[\"'][^)]*)?\)|^ {0,3}\[[^\]]+\]:\s+<?([^\s>]+)")
HEADING = re.compile(r"^#+\s+(.*?)\s*#*$")


def main(arguments: list[str]) -> int:
    roots = [
        Path(argument)
        for argument in arguments or ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs")
    ]
    files = [file for root in roots for file in _markdown(root)]
    problems = [problem for file in files for problem in check(file)]
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"{len(files)} Markdown files, {len(problems)} broken links")
    return 1 if problems or not files else 0


def check(file: Path) -> Iterator[str]:
    """A message for every relative link of the file that leads nowhere."""
    for number, line in _prose(file):
        for inline, reference in LINK.findall(CODE.sub("", line)):
            target = inline or reference
            if re.match(r"[a-z][a-z+.-]*:", target):
                continue
            path, _, anchor = target.partition("#")
            there = (file.parent / path) if path else file
            if not there.exists():
                yield f"{file}:{number}: {target}: there is no {there}"
            elif anchor and there.suffix == ".md" and anchor not in anchors(there):
                yield f"{file}:{number}: {target}: {there} has no heading for #{anchor}"


def anchors(file: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a file."""
    seen: Counter[str] = Counter()
    found = set()
    for _, line in _prose(file):
        heading = HEADING.match(line)
        if heading:
            text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading.group(1)).lower()
            slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
            found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
            seen[slug] += 1
    return found


def _markdown(root: Path) -> list[Path]:
    return sorted(root.rglob("*.md")) if root.is_dir() else [root]


def _prose(file: Path) -> Iterator[tuple[int, str]]:
    """The lines outside code blocks, with their numbers."""
    code = False
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if line.lstrip().startswith(("```", "~~~")):
            code = not code
        elif not code:
            yield number, line


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

"""Find words in comments, docstrings, messages and pages that tools/glossary.yaml replaces; part of `make lint`."""

import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("megatron_bipe", "preprocessing", "tests", "tools", "docs", "examples", "ds_configs", ".ci")
EXCLUDED = ("tests/golden/", "tests/unit/tools/test_glossary.py", "tools/glossary.yaml")
SUFFIXES = {".py", ".md", ".yaml", ".sh", ".sbatch", ".toml", ".txt", ".cff", ".html", ".css"}
NAMES = {"Makefile", "run"}


def find(text: str, name: str, replace: dict[re.Pattern[str], str], allow: list[re.Pattern[str]]) -> Iterator[str]:
    """Yield a message for each word of a file that is to be replaced.

    Args:
        text: the contents of the file.
        name: its path; of Python, only comments and strings are searched.
        replace: patterns with what to write instead.
        allow: patterns that are removed first; so is inline code.
    """
    for first_line, part in _strings_and_comments(text) if name.endswith(".py") else [(1, text)]:
        cleaned = part
        for pattern in (re.compile(r"`[^`\n]*`"), *allow):
            cleaned = pattern.sub(lambda found: re.sub(r"\S", " ", found[0]), cleaned)
        for pattern, instead in replace.items():
            for found in pattern.finditer(cleaned):
                line = first_line + cleaned.count("\n", 0, found.start())
                yield f"{name}:{line}: {' '.join(found[0].split())!r}; write: {instead}"


def compiled(patterns: list[str]) -> list[re.Pattern[str]]:
    """Compile patterns of complete words; a space also matches a line break with the start of a comment."""
    return [re.compile(rf"(?<![\w-])(?:{pattern})(?!\w)".replace(" ", r"\s+(?:# )?"), re.I) for pattern in patterns]


def _strings_and_comments(source: str) -> Iterator[tuple[int, str]]:
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.COMMENT, tokenize.STRING):
            yield token.start[0], token.string


def main() -> int:
    """Print every word to replace; return 1 if there are any."""
    words = yaml.safe_load((ROOT / "tools" / "glossary.yaml").read_text("utf-8"))
    replace = dict(zip(compiled(list(words["replace"])), words["replace"].values(), strict=True))
    allow = compiled(words["allow"])
    files = [*ROOT.glob("*"), *(file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*")))]
    num_found = 0
    for file in files:
        name = file.relative_to(ROOT).as_posix()
        if file.is_file() and (file.suffix in SUFFIXES or file.name in NAMES) and not name.startswith(EXCLUDED):
            for message in find(file.read_text("utf-8"), name, replace, allow):
                num_found += 1
                print(message)
    return int(num_found > 0)


if __name__ == "__main__":
    sys.exit(main())

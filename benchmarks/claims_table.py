"""docs/claims.md: what tutorials claim of mixed precision against what autoprec finds, from `claims.py`.

python benchmarks/claims_table.py            # writes the page
python benchmarks/claims_table.py --check    # exit code 1 where the page is not what would be written
"""

from __future__ import annotations

import argparse
import re
import sys

import claims_numbers
import claims_quality
import claims_speed
from claims import CLAIMS, Claim
from record import ROOT

#: each adds its claims to CLAIMS when it is imported
PARTS = (claims_numbers, claims_speed, claims_quality)
PAGE = ROOT / "docs" / "claims.md"


def table() -> str:
    """Return a section for each subject, with a table of its claims."""
    lines: list[str] = []
    for subject in dict.fromkeys(claim.subject for claim in CLAIMS):
        lines += [f"## {subject.capitalize()}", "", "| claim | | found | origin | source |", "|---|---|---|---|---|"]
        lines += [line for claim in CLAIMS if claim.subject == subject for line in rows(claim)]
        lines.append("")
    return "\n".join(lines)


def rows(claim: Claim) -> list[str]:
    """Return the lines of one claim: the claim and its verdict stand in the first."""
    verdict, findings = claim.find()
    heads = [(claim.text, f"**{verdict}**"), *[("", "")] * (len(findings) - 1)]
    return [
        f"| {text} | {word} | {found.text} | {found.origin} | {found.source} |"
        for (text, word), found in zip(heads, findings, strict=True)
    ]


def written(page: str) -> str:
    """Return the page with the tables as they are now."""
    return re.sub(
        r"(<!-- tables: begin .*? -->\n).*?(<!-- tables: end -->)",
        lambda match: match[1] + table() + match[2],
        page,
        flags=re.DOTALL,
    )


def main() -> int:
    """Write the page, or check it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    asked = parser.parse_args()
    page = PAGE.read_text()
    new = written(page)
    if asked.check:
        if new != page:
            print(f"{PAGE.relative_to(ROOT)} is not up to date: python benchmarks/claims_table.py", file=sys.stderr)
        return int(new != page)
    PAGE.write_text(new)
    print(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())

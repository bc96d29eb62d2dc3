"""List what is installed here with its licence, as each package states it; those that state none come last.

python scripts/licences.py
"""

from __future__ import annotations

from importlib.metadata import Distribution, distributions


def licence(package: Distribution) -> str | None:
    """Return the licence of a package: its SPDX expression, else its classifiers, else the first line of its text."""
    said = package.metadata
    if said["License-Expression"]:
        return str(said["License-Expression"])
    classifiers = [c.rpartition(" :: ")[2] for c in said.get_all("Classifier") or () if c.startswith("License :: ")]
    named = [c for c in classifiers if c != "OSI Approved"]
    if named:
        return ", ".join(named)
    text = (said["License"] or "").strip()
    if text:
        return text.splitlines()[0][:60]
    files = [path.name for path in package.files or () if "LICEN" in path.name.upper()]
    return f"see its {files[0]}" if files else None


def main() -> None:
    found = {p.metadata["Name"]: (p.version, licence(p)) for p in distributions()}
    for name, (version, said) in sorted(found.items(), key=lambda item: item[0].lower()):
        print(f"{name:32} {version:16} {said or 'states none'}")
    silent = [name for name, (_, said) in found.items() if said is None]
    if silent:
        print(f"no licence stated by: {', '.join(sorted(silent))}")


if __name__ == "__main__":
    main()

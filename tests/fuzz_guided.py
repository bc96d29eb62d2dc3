"""Mutations of one kind of file, guided by the coverage of autoprec's own code; run by `test_fuzz.py`.

    python tests/fuzz_guided.py KIND RUNS FOLDER

Exit code 0 where `fuzzing.assert_safe` held for all of them; else the one that broke it is kept in the empty FOLDER.
"""

from __future__ import annotations

import contextlib
import random
import sys
from functools import partial
from pathlib import Path


def main() -> None:
    """Mutate; the fuzzer ends the process."""
    import atheris

    with atheris.instrument_imports(include=["autoprec"]):
        from fuzzing import assert_safe, kinds, replaced
    kind, runs, corpus = kinds()[sys.argv[1]], int(sys.argv[2]), Path(sys.argv[3])
    (corpus / kind.name).write_bytes(kind.sound)

    def mutate(content: bytes, longest: int, seed: int) -> bytes:
        """Change a value of a document, so that more than its parser is met, or bytes."""
        chance = random.Random(seed)
        with contextlib.suppress(ValueError, IndexError):
            if kind.name.endswith(".json") and chance.random() < 0.7:
                return replaced(content, chance.randrange)[:longest]
        return bytes(atheris.Mutate(content, longest))

    options = [f"-runs={runs}", "-seed=1", f"-max_len={4 * len(kind.sound)}", "-timeout=10"]
    command = [sys.argv[0], *options, f"-artifact_prefix={corpus}/", str(corpus)]
    atheris.Setup(command, partial(assert_safe, kind), custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()

"""The TF32 switch through both of torch's interfaces: set without making either raise, and put back whole."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from autoprec.runtime import tf32
from autoprec.runtime.tf32 import tf32_set

backends: Any = torch.backends
read: Callable[[str, str], str] = getattr(torch._C, "_get_fp32_precision_getter")  # noqa: B009 (no stub has it)
write: Callable[[str, str, str], None] = getattr(torch._C, "_set_fp32_precision_setter")  # noqa: B009

PARTS = [
    *(("generic", "all"), ("cuda", "all"), ("cuda", "matmul"), ("cuda", "conv"), ("cuda", "rnn")),
    *(("mkldnn", "all"), ("mkldnn", "matmul"), ("mkldnn", "conv"), ("mkldnn", "rnn")),
]
USED = [("cuda", "matmul"), ("cuda", "conv"), ("cuda", "rnn")]


@pytest.fixture(autouse=True)
def as_a_fresh_process() -> Iterator[None]:
    reset()
    yield
    reset()


def reset() -> None:
    torch.set_float32_matmul_precision("highest")
    backends.cudnn.allow_tf32 = True
    for part in PARTS:
        write(*part, "tf32" if part[1] in ("conv", "rnn") and part[0] == "cuda" else "none")


def older() -> dict[str, Any]:
    """Read every older switch; 'raises' where torch refuses because the two kinds were mixed."""

    def asked(call: Callable[[], Any]) -> Any:
        try:
            return call()
        except RuntimeError as error:
            assert "mix" in str(error) or "different TF32 flags" in str(error)
            return "raises"

    return {
        "cuda.matmul.allow_tf32": asked(lambda: backends.cuda.matmul.allow_tf32),
        "float32_matmul_precision": asked(torch.get_float32_matmul_precision),
        "cudnn.allow_tf32": asked(lambda: backends.cudnn.allow_tf32),
    }


class Start(NamedTuple):
    """A state a user may have left the switches in: what is shared by several, then the rest."""

    write: Callable[[], None] = lambda: None
    general: str = "none"
    cuda: str = "none"
    mkldnn: str = "none"

    def make(self) -> None:
        self.make_shared()
        self.write()

    def make_shared(self) -> None:
        for backend, value in (("generic", self.general), ("cuda", self.cuda), ("mkldnn", self.mkldnn)):
            write(backend, "all", value)

    def read(self) -> list[Any]:
        """Read all switches, again under other shared settings too, which tells what inherits from them."""
        seen: list[Any] = []
        for backend in ("generic", "cuda", "mkldnn"):
            for value in ("none", "ieee", "tf32"):
                self.make_shared()
                write(backend, "all", value)
                seen.append((backend, value, [read(*part) for part in PARTS], older()))
        self.make_shared()
        return [*seen, [read(*part) for part in PARTS], older()]


def parts(**values: str) -> Callable[[], None]:
    """Return a call that writes newer switches: `cuda_matmul="tf32"`."""

    def call() -> None:
        for name, value in values.items():
            backend, _, operation = name.partition("_")
            write(backend, operation, value)

    return call


def forbid_cudnn() -> None:
    backends.cudnn.allow_tf32 = False


def allow_matmul() -> None:
    backends.cuda.matmul.allow_tf32 = True


def write_older_then_newer() -> None:
    torch.set_float32_matmul_precision("high")
    backends.cuda.matmul.fp32_precision = "ieee"
    backends.cudnn.allow_tf32 = False
    backends.cudnn.conv.fp32_precision = "tf32"


def medium_with_cpu_inheriting() -> None:
    torch.set_float32_matmul_precision("medium")
    write("mkldnn", "matmul", "none")


STARTS = {
    "as torch starts": Start(),
    "highest": Start(lambda: torch.set_float32_matmul_precision("highest")),
    "high": Start(lambda: torch.set_float32_matmul_precision("high")),
    "medium": Start(lambda: torch.set_float32_matmul_precision("medium")),
    "older matmul on": Start(allow_matmul),
    "older cudnn off": Start(forbid_cudnn),
    "newer matmul tf32": Start(parts(cuda_matmul="tf32")),
    "newer matmul ieee": Start(parts(cuda_matmul="ieee")),
    "newer conv alone ieee": Start(parts(cuda_conv="ieee")),
    "newer conv and rnn inherit": Start(parts(cuda_conv="none", cuda_rnn="none")),
    "tf32 by inheritance": Start(parts(cuda_conv="none", cuda_rnn="none"), general="tf32"),
    "ieee by inheritance": Start(parts(cuda_conv="none", cuda_rnn="none"), general="ieee"),
    "general bf16": Start(parts(cuda_conv="none"), general="bf16"),
    "tf32 at each level": Start(parts(cuda_matmul="tf32"), general="tf32", cuda="tf32"),
    "general and matmul tf32": Start(parts(cuda_matmul="tf32"), general="tf32"),
    "backend tf32": Start(parts(cuda_rnn="none"), cuda="tf32"),
    "backend ieee under tf32": Start(parts(cuda_conv="none"), general="tf32", cuda="ieee"),
    "medium, the CPU inherits": Start(medium_with_cpu_inheriting, mkldnn="bf16"),
    "older then newer": Start(write_older_then_newer),
}


@pytest.fixture(params=list(STARTS.values()), ids=list(STARTS))
def start(request: pytest.FixtureRequest) -> Start:
    made: Start = request.param
    made.make()
    return made


def assert_in_force(on: bool) -> None:
    assert [read(*part) == "tf32" for part in USED] == [on] * 3


@pytest.mark.parametrize("on", [True, False])
def test_every_state_is_put_back(start: Start, on: bool) -> None:
    state, before = start.read(), older()
    with tf32_set(on, "cuda"):
        assert_in_force(on)
        during = older()
        assert not [name for name, value in during.items() if value == "raises" and before[name] != "raises"]
        assert during["cuda.matmul.allow_tf32"] in (on, "raises")
        assert during["cudnn.allow_tf32"] in (on, "raises")
    assert start.read() == state


@pytest.mark.parametrize("on", [True, False])
@pytest.mark.parametrize("meanwhile", STARTS.values(), ids=STARTS)
def test_what_the_user_writes_meanwhile_is_undone(on: bool, meanwhile: Start) -> None:
    start = Start()
    before = start.read()
    with tf32_set(on, "cuda"):
        meanwhile.make()
    assert read("generic", "all") == meanwhile.general  # what is shared is no business of the block's
    start.make_shared()
    assert start.read() == before


@pytest.mark.parametrize("inner", [True, False])
@pytest.mark.parametrize("outer", [True, False])
def test_nested_blocks(start: Start, outer: bool, inner: bool) -> None:
    state = start.read()
    with tf32_set(outer, "cuda"):
        with tf32_set(inner, "cuda"):
            assert_in_force(inner)
        assert_in_force(outer)
    assert start.read() == state


def test_blocks_may_end_in_any_order(start: Start) -> None:
    state = start.read()
    first, second, third = tf32_set(True, "cuda"), tf32_set(False, "cuda"), tf32_set(True, "cuda")
    for block in (first, second, third):
        block.__enter__()
    first.__exit__(None, None, None)
    assert_in_force(True)
    third.__exit__(None, None, None)
    assert_in_force(False)
    first = tf32_set(True, "cuda")
    first.__enter__()
    second.__exit__(None, None, None)
    assert_in_force(True)
    first.__exit__(None, None, None)
    assert start.read() == state


def test_an_error_inside_puts_back(start: Start) -> None:
    state = start.read()
    with pytest.raises(ValueError, match="^training stopped$"), tf32_set(True, "cuda"):
        raise ValueError("training stopped")
    assert start.read() == state


def test_dropping_the_block_leaves_it_in_force() -> None:
    block = tf32_set(True, "cuda")
    block.__enter__()
    del block
    gc.collect()
    assert_in_force(True)  # as a plan whose handle nobody kept
    tf32._IN_FORCE[-1].__exit__(None, None, None)
    assert read("cuda", "matmul") == "none"


def test_older_switches_can_be_written_meanwhile() -> None:
    for on in (True, False):
        with tf32_set(on, "cuda"):
            backends.cuda.matmul.allow_tf32 = not on
            assert backends.cuda.matmul.allow_tf32 is not on
            torch.set_float32_matmul_precision("medium")
            assert torch.get_float32_matmul_precision() == "medium"
            backends.cudnn.allow_tf32 = not on
            assert backends.cudnn.allow_tf32 is not on
        assert (torch.get_float32_matmul_precision(), backends.cudnn.allow_tf32) == ("highest", True)


def test_a_switch_that_stands_right_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_float32_matmul_precision("medium")
    written: list[Any] = []
    for setter in ("_set_cublas_allow_tf32", "_set_cudnn_allow_tf32", "_set_fp32_precision_setter"):
        monkeypatch.setattr(torch._C, setter, lambda *values: written.append(values))
    monkeypatch.setattr(torch, "set_float32_matmul_precision", written.append)
    with tf32_set(True, "cuda"):
        assert torch.get_float32_matmul_precision() == "medium"
    assert written == []


@pytest.mark.parametrize("device", ["cpu", "meta", "mps"])
def test_other_devices_leave_the_switch_alone(device: str) -> None:
    with tf32_set(True, device):
        assert [read(*part) for part in USED] == ["none", "tf32", "tf32"]


def test_older_interface_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tf32, "_KEYS", ())
    for allowed in (True, False):
        backends.cuda.matmul.allow_tf32 = backends.cudnn.allow_tf32 = allowed
        for on in (True, False):
            with tf32_set(on, "cuda"):
                assert (backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32) == (on, on)
            assert (backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32) == (allowed, allowed)
            write("mkldnn", "matmul", "none")  # which "high" and "highest" write along, newer interface or not


FRESH = """
import torch
from autoprec.runtime.tf32 import tf32_set

def read():
    newer = [torch._C._get_fp32_precision_getter(*p) for p in
             [("generic", "all"), ("cuda", "matmul"), ("cuda", "conv"), ("cuda", "rnn"), ("mkldnn", "matmul")]]
    older = [torch.backends.cuda.matmul.allow_tf32, torch.get_float32_matmul_precision(),
             torch.backends.cudnn.allow_tf32]
    return newer + older

before = read()
for on in (True, False):
    with tf32_set(on, "cuda"):
        print(read()[5:])
    assert read() == before, read()
torch.backends.fp32_precision = "tf32"
print(torch.backends.cuda.matmul.fp32_precision)
"""


def test_in_a_fresh_process_with_warnings_as_errors() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", FRESH], capture_output=True, text=True, cwd=Path(__file__).parent.parent
    )
    assert done.returncode == 0, done.stderr
    # the last line: the matmul inherits again, as it did before
    assert done.stdout.splitlines() == ["[True, 'high', True]", "[False, 'highest', False]", "tf32"]

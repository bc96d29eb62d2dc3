"""From kernels to seconds on a card: matmuls by tiles, the rest by bytes, each phase no shorter than the host needs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from autoprec.predict.card import Card, Units
from autoprec.predict.gemm import gemm_seconds
from autoprec.predict.kernels import Kernel, Kind, Phase

__all__ = ["OVERLAP", "Priced", "Pricer"]

#: bytes an element of a matmul's operands
_WIDTHS = {"fp32": 4, "tf32": 4, "bf16": 2, "fp16": 2, "fp8": 1}
#: FP8 products write 16-bit results
_LEAST_OUT = 2
#: busy device and busy host overlap but not wholly: a norm of this order joins them
OVERLAP = 4


@dataclass(slots=True)
class Priced:
    """Seconds of some kernels on the device, and what the host needs to launch them; sums, by phase and kind."""

    device: dict[Phase, float] = field(default_factory=dict)
    launches: dict[Phase, float] = field(default_factory=dict)
    kinds: dict[Kind, float] = field(default_factory=dict)
    #: of products and fused attention, by the format of what they multiply
    products: dict[str, float] = field(default_factory=dict)

    def add(self, other: Priced, times: float = 1.0) -> None:
        """Add another's sums."""
        for mine, theirs in ((self.device, other.device), (self.launches, other.launches)):
            for phase, value in theirs.items():
                mine[phase] = mine.get(phase, 0.0) + times * value
        for kind, value in other.kinds.items():
            self.kinds[kind] = self.kinds.get(kind, 0.0) + times * value
        for operands, value in other.products.items():
            self.products[operands] = self.products.get(operands, 0.0) + times * value


class Pricer:
    """Prices kernels on one card, each shape once."""

    def __init__(self, card: Card, *, compiled: bool = False) -> None:
        self.card, self.compiled = card, compiled
        self._known: dict[tuple[object, ...], float] = {}

    def price(self, kernels: Iterable[Kernel]) -> Priced:
        """Return the sums over some kernels."""
        total = Priced()
        for kernel in kernels:
            seconds = self.seconds(kernel)
            launches = kernel.fused_launches if self.compiled else kernel.launches
            total.device[kernel.phase] = total.device.get(kernel.phase, 0.0) + seconds
            total.launches[kernel.phase] = total.launches.get(kernel.phase, 0.0) + launches
            total.kinds[kernel.kind] = total.kinds.get(kernel.kind, 0.0) + seconds
            if kernel.operands:
                total.products[kernel.operands] = total.products.get(kernel.operands, 0.0) + seconds
        return total

    def again(self, kernels: Iterable[Kernel], *, matmuls: bool) -> Priced:
        """Return the sums of forward kernels that run again in the backward; without `matmuls`, only the others."""
        repeated = (
            replace(kernel, phase=Phase.BACKWARD)
            for kernel in kernels
            if kernel.phase is Phase.FORWARD and (matmuls or not kernel.operands)
        )
        return self.price(repeated)

    @property
    def launch_seconds(self) -> float:
        """What the host needs to launch a kernel."""
        family = self.card.family
        return family.compiled_seconds if self.compiled else self.card.eager_seconds or family.eager_seconds

    def step_seconds(self, priced: Priced, slower: float = 1.0) -> dict[Phase, float]:
        """Return the seconds of each phase: the device's, or the host's where that takes longer.

        Args:
            slower: how many times what is known of the host it takes.
        """
        each = slower * self.launch_seconds
        return {
            phase: (busy**OVERLAP + (each * priced.launches[phase]) ** OVERLAP) ** (1 / OVERLAP)
            for phase, busy in priced.device.items()
        }

    def seconds(self, kernel: Kernel) -> float:
        """Return what one kernel takes on the device."""
        if kernel.m:
            key = (kernel.m, kernel.n, kernel.k, kernel.batch, kernel.operands, kernel.out_width)
            if key not in self._known:
                self._known[key] = self.matmul(
                    kernel.m, kernel.n, kernel.k, kernel.operands, batch=kernel.batch, out_width=kernel.out_width
                )
            return self._known[key]
        moved = kernel.fused if self.compiled else kernel.moved
        launches = kernel.fused_launches if self.compiled else kernel.launches
        family = self.card.family
        flow = moved / (self.card.bandwidth * family.move_bandwidth) + launches * family.start_seconds
        return flow if not kernel.flops else max(flow, self._attention(kernel))

    def matmul(self, m: int, n: int, k: int, operands: str, *, batch: int = 1, out_width: int | None = None) -> float:
        """Return the seconds of a product; results are as wide as operands, 16 bits at least.

        Raises:
            DeviceError: the card does not multiply in this format.
        """
        card, rate = self.card, self.card.rate(operands)
        width = _WIDTHS[operands]
        out = max(_LEAST_OUT, width) if out_width is None else out_width
        engine = card.family.vector if rate.units is Units.VECTOR else card.family.matrix
        return float(
            gemm_seconds(
                card.family,
                engine,
                m=m,
                n=n,
                k=k,
                batch=batch,
                rate=rate.flops,
                units=card.units,
                bandwidth=card.bandwidth,
                width=width,
                out_width=out,
                long_rows=card.long_rows,
            )
        )

    def _attention(self, kernel: Kernel) -> float:
        """Return the seconds of fused attention by its arithmetic."""
        shares = self.card.attention
        share = shares.forward if kernel.phase is Phase.FORWARD else shares.backward
        filled = kernel.length / (kernel.length + shares.half_length)
        return kernel.flops / (self.card.rate(kernel.operands).flops * share * filled)

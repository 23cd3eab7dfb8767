"""Hypothesis strategies: calls of the coded operators, and files that were tampered with.

Numbers are positive, so that sums do not cancel and errors can be told from rounding; signs are the
business of the named cases.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

OPERATORS = (
    "branch_energy",
    "coded_aggregate",
    "coding_loss",
    "grouped_conv3x3",
    "conv1x1",
    "join_conv1x1",
    "product_join",
    "CodedBottleneck",
)
CALLED_BY_BLOCKS = ("conv1x1", "join_conv1x1", "product_join")
LAYOUTS = ("contiguous", "channels_last", "sliced", "transposed", "expanded", "offset")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
EXTREMES = (0.0, 1e-30, 1e-6, 1e4, 6e4)
# Most elements of the activations, and of the branch tensor that the definition forms.
LONG = (65_536, 262_144)
ON_CPU = (8_192, 32_768)
INTERPRETED = (512, 2_048)


@dataclass(frozen=True)
class Call:
    """Sizes and options of a call; letters as in docs/math.md."""

    B: int
    N: int
    D: int
    C: int
    H: int
    W: int
    K: int
    layout: str
    dtype: torch.dtype
    affine: bool
    drop: bool
    keep: bool
    concat: bool
    stride: int
    seed: int

    def positive(self, *shape: int, place: int = 0, low: float = 0.1) -> Tensor:
        """Random numbers between `low` and 1.1, exact in the dtype; as float64."""
        generator = torch.Generator().manual_seed(self.seed + place)
        values = low + torch.rand(shape, generator=generator, dtype=torch.float64)
        return values.to(self.dtype).double()

    def activations(self) -> Tensor:
        """`[B, N*D, H, W]` in dtype and layout."""
        shape = (self.B, self.N * self.D, self.H, self.W)
        return laid_out(self.positive(*shape).to(self.dtype), self.layout)

    def masks(self) -> dict[str, Tensor]:
        """`drop_mask` and `keep_mask [B, N]`; a first branch stays, so that no sample is dead."""
        actual = {}
        for name, wanted, value in (("drop_mask", self.drop, 1.25), ("keep_mask", self.keep, 1.0)):
            if wanted:
                mask = (self.positive(self.B, self.N, place=len(name)) > 0.5).double() * value
                mask[:, :1] = value
                actual[name] = mask
        return actual


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The same values `[B, C, H, W]` under other strides; expanded, those of the first sample."""
    if layout == "channels_last":
        return values.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        return torch.cat([values, values, values], 1)[:, values.shape[1] : 2 * values.shape[1]]
    if layout == "transposed":
        return values.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "expanded":
        return values[:1].expand_as(values) if len(values) else values
    if layout == "offset":
        behind = torch.empty(values.numel() + 3, dtype=values.dtype)
        return behind[3:].view_as(values).copy_(values)
    return values


@st.composite
def calls(
    draw: st.DrawFn,
    operator: str,
    limits: tuple[int, int] = ON_CPU,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
) -> Call:
    """A call whose activations and branch tensor have no more elements than the limits."""
    wide, outputs = limits
    most = {"B": 17, "N": 33, "D": 64, "H": 33, "W": 33, "C": 33}
    sizes = {}
    # What calls these operators has refused no samples before.
    if draw(st.integers(0, 24)) == 0 and operator not in CALLED_BY_BLOCKS:
        most.pop("B")
        sizes["B"] = 0
    for name in draw(st.permutations(list(most))):
        taken = max(1, sizes.get("B", 1))
        for other in "NHW":
            taken *= sizes.get(other, 1)
        # The grouped convolution has `N*D*D` weights and more, the expand one `N*D*C`.
        left = min(
            wide // (taken * sizes.get("D", 1)),
            outputs // (taken * max(sizes.get("C", 1), sizes.get("D", 1))),
        )
        sizes[name] = draw(st.integers(1, max(1, min(most[name], left))))
    if operator in ("coding_loss", "CodedBottleneck"):
        # A codebook needs two branches.
        sizes["N"] = max(2, sizes["N"])
    stride = draw(st.integers(1, 2))
    dtype = draw(st.sampled_from(dtypes))
    if operator in ("grouped_conv3x3", "CodedBottleneck") and dtype == torch.bfloat16:
        # On CPUs PyTorch's own bfloat16 convolutions with a stride are wrong on maps of fewer
        # than four columns (docs/reliability.md).
        stride = stride if sizes["W"] > 3 else 1
    concat = operator == "coded_aggregate" and draw(st.booleans())
    if concat:
        sizes["C"] = max(1, sizes["C"] // sizes["N"]) * sizes["N"]
    return Call(
        **sizes,
        K=draw(st.integers(2, min(40, max(2, sizes["N"])))),
        layout=draw(st.sampled_from(LAYOUTS)),
        dtype=dtype,
        affine=draw(st.booleans()),
        drop=draw(st.booleans()),
        keep=draw(st.booleans()),
        concat=concat,
        stride=stride,
        seed=draw(st.integers(0, 2**31)),
    )

"""Named cases of the coded aggregation; each covers a regime that its name states."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """Sizes and options of one call of `coded_aggregate`; letters as in docs/math.md."""

    name: str
    B: int = 3
    N: int = 4
    D: int = 3
    C: int = 8
    H: int = 4
    W: int = 4
    layout: str = "contiguous"
    drop: bool = False
    keep: bool = False
    concat: bool = False

    def inputs(self, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Activations and weight; the activations are rectified, as they are in a block."""
        generator = torch.Generator().manual_seed(seed)
        h = torch.randn(self.B, self.N * self.D, self.H, self.W, generator=generator).relu() + 0.1
        columns = self.D if self.concat else self.N * self.D
        weight = torch.randn(self.C, columns, 1, 1, generator=generator)
        return self.lay_out(h.to(dtype)), weight.to(dtype)

    def lay_out(self, h: Tensor) -> Tensor:
        """The same values in the layout of the case."""
        if self.layout == "channels_last":
            return h.contiguous(memory_format=torch.channels_last)
        if self.layout == "sliced":
            return torch.cat([h, h], 3)[..., : self.W]
        if self.layout == "expanded":
            return h[:1].expand(self.B, -1, -1, -1)
        return h

    def masks(self) -> dict[str, Tensor]:
        """The masks of the case; every sample keeps a branch."""
        masks = {}
        if self.drop:
            mask = torch.full((self.B, self.N), 1.25)
            mask[0, 0] = mask[-1, -1] = 0
            masks["drop_mask"] = mask
        if self.keep:
            mask = torch.ones(self.B, self.N, dtype=torch.bool)
            mask[0, 1:] = False
            mask[-1, 0] = self.N == 1
            masks["keep_mask"] = mask
        return masks

    def options(self) -> dict[str, object]:
        """Keyword arguments of `coded_aggregate` beside the inputs and the backend."""
        return {**self.masks(), "aggregation": "concat" if self.concat else "sum"}


CASES = [
    Case("plain_sizes"),
    Case("odd_maps", H=7, W=5),
    Case("one_pixel", H=1, W=1),
    Case("one_branch", N=1, D=5),
    Case("width_one", D=1, N=6),
    Case("one_sample", B=1, keep=True),
    Case("width_above_channels", D=9, C=4),
    Case("drop_mask", drop=True),
    Case("keep_mask", keep=True),
    Case("both_masks", drop=True, keep=True, H=3, W=5),
    Case("channels_last", layout="channels_last", H=5, W=3),
    Case("channels_last_masks", layout="channels_last", drop=True, keep=True),
    Case("sliced", layout="sliced", drop=True),
    Case("expanded", layout="expanded"),
    Case("concat", concat=True),
    Case("concat_masks", concat=True, drop=True, keep=True, layout="channels_last"),
]

"""Named cases of the coded aggregation; each covers a regime that its name states."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from coded_resnext.kernels import coded_aggregate


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

# What the kernels cut differently from one another: windows of several branches, padded windows,
# windows that do not fill a program, maps of several blocks of pixels.
KERNEL_CASES = [
    Case("imagenet_16", B=2, N=3, D=16, H=5, W=5, layout="channels_last"),
    Case("imagenet_32", B=2, N=2, D=32, H=5, W=5, layout="channels_last", drop=True),
    Case("four_branches_a_window", N=6, D=4, H=7, W=5, layout="channels_last", keep=True),
    Case("two_branches_a_window", N=5, D=8, H=5, W=7, drop=True, keep=True),
    Case("cifar_11", B=2, N=3, D=11, layout="channels_last", drop=True),
    Case("cifar_22", B=2, N=2, D=22, layout="channels_last", keep=True),
    Case("cifar_44", B=2, N=2, D=44, layout="channels_last", drop=True),
    Case("cifar_6", N=5, D=6, layout="channels_last"),
    Case("cifar_12", N=5, D=12, drop=True),
    Case("cifar_24", B=2, N=2, D=24, layout="channels_last"),
    Case("two_steps_of_windows", B=2, N=9, D=16, H=3, W=3, layout="channels_last"),
    Case("two_blocks_of_pixels", B=2, N=2, D=4, H=10, W=9, layout="channels_last", drop=True),
    Case("two_blocks_of_44", B=2, N=2, D=44, H=10, W=9, layout="channels_last", drop=True),
    Case("samples_of_two_programs", B=11, N=2, D=4, H=2, W=2, layout="channels_last", keep=True),
]


def outputs_and_gradients(
    case: Case, dtype: torch.dtype, backend: str, like: torch.dtype, device: str = "cpu"
) -> dict[str, Tensor]:
    """Everything a call gives, in `dtype`, for inputs that are exact in `like`."""
    h, weight = case.inputs(like)
    h, weight = (v.to(dtype).to(device).requires_grad_() for v in (h, weight))
    y, energies = coded_aggregate(h, weight, case.N, backend=backend, **case.options())
    generator = torch.Generator().manual_seed(1)
    grad_y = torch.randn(y.shape, generator=generator).to(like).to(y)
    grad_energies = torch.randn(energies.shape, generator=generator).to(like).to(energies)
    grads = torch.autograd.grad((y, energies), (h, weight), (grad_y, grad_energies))
    return {"y": y, "energies": energies, "grad_h": grads[0], "grad_weight": grads[1]}

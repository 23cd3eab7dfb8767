"""A function of tensors, made again without its Python: its operators and launches in a row.

What a fused block computes depends on the layouts of its tensors and on its settings alone, never
on values. The second call with the same ones is recorded, and every later one replays the
recording: it allocates, launches and calls operators, and decides nothing. Views that kernels alone
read are left out, since a kernel takes an address.

A recording is the function of a graph of `torch.fx`, which drops every tensor behind its last use.
None is made of calls with subclasses of tensors, such as PyTorch's fake ones.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from math import prod
from operator import getitem
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from torch.utils.weak import WeakIdKeyDictionary

from . import rows
from .layout import on_device, tf32_allowed

Function = Callable[[Sequence[Any], Any], list[Tensor | None]]
MaybeTensors = Sequence[Tensor | None]

# Recordings of a function that are kept; images of ever new sizes would make ever more of them.
MOST = 512
_PLAIN = frozenset([Tensor, nn.Parameter])
_LAUNCH = rows.LaunchRow.launch
_ALLOCATIONS = frozenset(
    [
        torch.ops.aten.empty.memory_format,
        torch.ops.aten.empty_like.default,
        torch.ops.aten.empty_strided.default,
        torch.ops.aten.new_empty.default,
        torch.ops.aten.new_empty_strided.default,
    ]
)


def _view(whole: Tensor, shape: Sequence[int], stride: Sequence[int], offset: int) -> Tensor:
    """Returns another view of a tensor that may begin anywhere in its memory."""
    return whole.as_strided(shape, stride, whole.storage_offset() + offset)


_VIEWS = (_view, torch.as_strided)


def _stream() -> Any:
    from triton.runtime import driver

    return driver.active.get_current_stream(driver.active.get_current_device())


class _Value(NamedTuple):
    """The node of a tensor, and that of the tensor with memory of its own that it is a view of."""

    node: fx.Node
    whole: fx.Node
    address: int
    """Of the whole, as the offset and the dtype are."""
    offset: int
    dtype: torch.dtype


class _Recorder(TorchDispatchMode):
    """Notes what a function does as a graph of `torch.fx`, and keeps none of its tensors.

    Args:
        inputs: the tensors that the function is given.
    """

    def __init__(self, inputs: MaybeTensors) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.graph = fx.Graph()
        self.reason: str | None = None
        """Why the function cannot be replayed."""
        self.launches = set[fx.Node]()
        self._inputs: dict[torch.device, fx.Node] = {}
        """One of each device."""
        self._allocated: list[fx.Node] = []
        self._is_launching = False
        self._values: Any = WeakIdKeyDictionary()
        for index, x in enumerate(inputs):
            node = self.graph.placeholder(f"x{index}")
            if x is not None and x not in self._values:
                self._note(x, node)
                self._inputs.setdefault(x.device, node)
        self._stream = self.graph.call_function(_stream)

    def _note(self, whole: Tensor, node: fx.Node) -> None:
        """Notes the node of a tensor with memory of its own."""
        values = (whole.data_ptr(), int(whole.storage_offset()), whole.dtype)
        self._values[whole] = _Value(node, node, *values)

    def node_of(self, value: Any) -> Any:
        """Returns the node of a tensor; another value itself."""
        if not isinstance(value, Tensor):
            return value
        known = self._values.get(value)
        if known is None:
            self.reason = "it reads a tensor that it was not given"
            return None
        return known.node

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._is_launching:
            # What the interpreter does to run a kernel.
            return result
        if func.namespace != "aten":
            # Others may do what their arguments do not tell, such as to ask other processes.
            self.reason = f"{func} is no operator of ATen"
        results = list(result) if isinstance(result, tuple | list) else [result]
        new = [
            (index, each)
            for index, each in enumerate(results)
            if each is not None and not (isinstance(each, Tensor) and each in self._values)
        ]
        if not all(isinstance(each, Tensor) for _, each in new):
            self.reason = f"{func} returns what is no tensor"
        elif func in _ALLOCATIONS:
            self._note_allocated(result)
        else:
            given = pytree.tree_map(self.node_of, (args, kwargs or {}))
            read = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            computed = [(index, each) for index, each in new if not self._is_view(each, read)]
            if computed or func._schema.is_mutable:
                node = self.graph.call_function(func, *given)
                for index, each in computed:
                    several = result is not each
                    item = self.graph.call_function(getitem, (node, index)) if several else node
                    self._note(each, item)
        return result

    def _note_allocated(self, x: Tensor) -> None:
        like = self._inputs.get(x.device)
        if like is None:
            self.reason = f"it allocates on {x.device}, where no input is"
            return
        arguments = (like, (*x.shape,), x.stride())
        node = self.graph.call_method("new_empty_strided", arguments, {"dtype": x.dtype})
        self._allocated.append(node)
        self._note(x, node)

    def _is_view(self, x: Tensor, read: Sequence[Tensor]) -> bool:
        """Returns whether a result is a view of what an operator has read, and notes it as one."""
        memory = x.untyped_storage()._cdata
        for each in read:
            known = self._values.get(each)
            if known and each.dtype == x.dtype and each.untyped_storage()._cdata == memory:
                begins = known.whole.op != "placeholder" and known.offset == 0
                view = torch.as_strided if begins else _view
                arguments = ((*x.shape,), x.stride(), x.storage_offset() - known.offset)
                node = self.graph.call_function(view, (known.whole, *arguments))
                self._values[x] = known._replace(node=node)
                return True
        return False

    def launch(
        self, kernel: Callable[..., Any], arguments: tuple[Any, ...], *, is_compiled: bool
    ) -> Any:
        """Launches a kernel and notes it."""
        nodes = []
        for each in arguments:
            node = self.node_of(each)
            if isinstance(node, fx.Node):
                known = self._values[each]
                if (known.address, known.dtype) == (each.data_ptr(), each.dtype):
                    node = known.whole
            nodes.append(node)

        def launched(*arguments: Any) -> None:
            kernel(*arguments)

        # Triton would ask for the stream at each launch.
        options: dict[str, Any] = {"stream": self._stream} if is_compiled else {}
        target = kernel if is_compiled else launched
        self.launches.add(self.graph.call_function(target, (*nodes,), options))
        self._is_launching = True
        try:
            return kernel(*arguments)
        finally:
            self._is_launching = False

    def compiled(self, outputs: MaybeTensors) -> Callable[..., list[Tensor | None]] | None:
        """Returns what was noted as a function of the inputs; None where there is a reason."""
        self.graph.output([self.node_of(each) for each in outputs])
        if self.reason is not None:
            return None
        for node in self._allocated:
            self._allocate_as_view(node)
        self.graph.eliminate_dead_code(lambda node: node.is_impure() or node in self.launches)
        forward: Any = fx.GraphModule({}, self.graph).forward
        # Without its module, which would keep the graph.
        return partial(forward.__func__, None)

    def _allocate_as_view(self, node: fx.Node) -> None:
        """Allocates a tensor that nobody reads in its own layout in that of the first view of all
        its memory: kernels take addresses, and other views are of the memory."""
        views = [user for user in node.users if user.target in _VIEWS]
        if len(views) + len(self.launches.intersection(node.users)) < len(node.users):
            return
        for view in views:
            shape, stride, offset = cast("tuple[Any, Any, int]", view.args[1:])
            reach = 1 + sum((size - 1) * by for size, by in zip(shape, stride, strict=True))
            if offset == 0 and reach == prod(shape) == prod(cast("Any", node.args[1])):
                node.args = (node.args[0], shape, stride)
                view.replace_all_uses_with(node)
                return


_MADE: list[Replayed] = []


def forget() -> None:
    """Forgets all recordings, as whoever changes a kernel has to."""
    for each in _MADE:
        each.recordings.clear()


def observed() -> bool:
    """Returns whether somebody sees every operator, as modes of PyTorch do, or every launch.

    They see what a function is made of, the same at each call.
    """
    return _get_current_dispatch_mode() is not None or rows.LaunchRow.launch is not _LAUNCH


class Replayed:
    """A function that is recorded at its second call with the same layouts, and replayed.

    Args:
        function: of tensors, some of which may be None, and of hashable settings; it returns
            tensors or None. It must depend on nothing else, must draw no random numbers, and must
            compute without autocast. What reads values, tensors that it was not given, or calls
            operators that are not ATen's, is called every time.
    """

    def __init__(self, function: Function) -> None:
        self.function = function
        _MADE.append(self)
        self.recordings: dict[Hashable, Callable[..., list[Tensor | None]] | None] = {}
        """By settings and layouts; None for what was called once."""

    def __call__(self, tensors: MaybeTensors, settings: Hashable) -> list[Tensor | None]:
        present = [each for each in tensors if each is not None]
        first, ids = present[0], list(map(id, present))
        if (
            not _PLAIN.issuperset(map(type, present))
            or first.is_meta
            or rows.launches_nothing()
            or observed()
        ):
            return self.function(tensors, settings)
        # The same tensor, given twice, may be two tensors in another call.
        twice = None if len(set(ids)) == len(ids) else tuple(map(ids.index, ids))
        rounds = first.dtype == torch.float32 and (tf32_allowed(), tf32_allowed(True))
        key = (settings, first.device, rounds, twice, *map(_layout, tensors))
        recording = self.recordings.get(key)
        if recording is None:
            if key in self.recordings:
                return self._recorded(key, tensors, settings)
            if len(self.recordings) >= MOST:
                self.recordings.clear()
            self.recordings[key] = None
            return self.function(tensors, settings)
        device = first.device.type
        autocasts = torch.is_autocast_enabled(device)
        # The context of PyTorch takes ten times as long.
        torch.set_autocast_enabled(device, False)
        try:
            with on_device(first):
                return recording(*tensors)
        finally:
            torch.set_autocast_enabled(device, autocasts)

    def _recorded(
        self, key: Hashable, tensors: MaybeTensors, settings: Hashable
    ) -> list[Tensor | None]:
        recorder = _Recorder(tensors)
        with rows.launches_by(recorder.launch), recorder:
            outputs = self.function(tensors, settings)
        self.recordings[key] = recorder.compiled(outputs) or partial(self._directly, settings)
        return outputs

    def _directly(self, settings: Hashable, *tensors: Tensor | None) -> list[Tensor | None]:
        return self.function(tensors, settings)


def _layout(x: Tensor | None) -> Hashable:
    return None if x is None else (x.dtype, x.shape, x.stride(), x.data_ptr() % 16 == 0)

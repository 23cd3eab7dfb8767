"""A function of tensors, made again without its Python: its operators and launches in a row.

What a fused block computes depends on the layouts of its tensors and on its settings alone, never
on values. The second call with the same ones is recorded, and every later one replays the
recording: it allocates, launches and calls operators, and decides nothing. Views that kernels alone
read are left out, since a kernel takes an address.

A recording is a function in Python's own text, a statement for each step, that drops every tensor
behind its last use. None is made of calls with subclasses of tensors, such as PyTorch's fake ones.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from torch.utils.weak import WeakIdKeyDictionary

from . import rows
from .layout import on_device, tf32_allowed

Function = Callable[[Sequence[Any], Any], list[Tensor | None]]
MaybeTensors = Sequence[Tensor | None]

# Recordings of a function that are kept; images of ever new sizes would make ever more of them.
MOST = 2048
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


class _Name(str):
    """The name of a tensor in the text of a recording."""

    __slots__ = ()


_STREAM = _Name("stream")


class _Step(NamedTuple):
    """A statement of a recording."""

    function: Callable[..., Any]
    arguments: Sequence[Any]
    keywords: dict[str, Any]
    result: _Name | None
    """None where it is there for what it writes."""
    launches: bool = False
    """Whether it launches a kernel of Triton's."""

    def names(self) -> Iterator[_Name]:
        """Returns the names of the tensors that it reads or writes."""
        leaves = pytree.tree_leaves((self.arguments, self.keywords))
        return (leaf for leaf in leaves if isinstance(leaf, _Name))


def _allocated(
    shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    raise AssertionError("it stands for torch.empty_strided")


def _view(whole: Tensor, shape: Sequence[int], stride: Sequence[int], offset: int) -> Tensor:
    """Returns another view of a tensor that may begin anywhere in its memory."""
    return whole.as_strided(shape, stride, whole.storage_offset() + offset)


_VIEWS = (_view, torch.as_strided)


def _item(values: Sequence[Tensor], index: int) -> Tensor:
    return values[index]


def _stream() -> Any:
    from triton.runtime import driver

    return driver.active.get_current_stream(driver.active.get_current_device())


class _Value(NamedTuple):
    """What a tensor is called, and the tensor with memory of its own that it is a view of."""

    name: _Name
    whole: _Name
    address: int
    """Of the whole, as the offset and the dtype are."""
    offset: int
    dtype: torch.dtype

    @classmethod
    def of_whole(cls, name: _Name, x: Tensor) -> _Value:
        """Returns that of a tensor that is no view."""
        return cls(name, name, x.data_ptr(), int(x.storage_offset()), x.dtype)


class _Recorder(TorchDispatchMode):
    """Notes what a function does, and keeps none of its tensors.

    Args:
        inputs: the tensors that the function is given.
    """

    def __init__(self, inputs: MaybeTensors) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.steps: list[_Step] = []
        self.reason: str | None = None
        """Why the function cannot be replayed."""
        self._launches = False
        self._count = 0
        self._values: Any = WeakIdKeyDictionary()
        self.inputs = [self._new_name() for _ in inputs]
        for name, x in zip(self.inputs, inputs, strict=True):
            if x is not None and x not in self._values:
                self._values[x] = _Value.of_whole(name, x)

    def _new_name(self, whole: Tensor | None = None) -> _Name:
        """Returns a new name, that of a tensor with memory of its own if one is given."""
        name = _Name(f"t{self._count}")
        self._count += 1
        if whole is not None:
            self._values[whole] = _Value.of_whole(name, whole)
        return name

    def name_of(self, value: Any) -> Any:
        """Returns the name of a tensor; another value itself."""
        if not isinstance(value, Tensor):
            return value
        known = self._values.get(value)
        if known is None:
            self.reason = "it reads a tensor that it was not given"
            return None
        return known.name

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._launches:
            # What the interpreter does to run a kernel.
            return result
        if func.namespace != "aten":
            # Others may do what their arguments do not tell, such as to ask other processes.
            self.reason = f"{func} is no operator of ATen"
        arguments, keywords = pytree.tree_map(self.name_of, (args, kwargs or {}))
        results = list(result) if isinstance(result, tuple | list) else [result]
        new = [
            (index, each)
            for index, each in enumerate(results)
            if each is not None and not (isinstance(each, Tensor) and each in self._values)
        ]
        if not all(isinstance(each, Tensor) for _, each in new):
            self.reason = f"{func} returns what is no tensor"
        elif func._schema.is_mutable:
            self.steps.append(_Step(func, arguments, keywords, None))
            if new:
                self.reason = f"{func} both writes to tensors and makes new ones"
        elif func in _ALLOCATIONS:
            layout = (*result.shape,), result.stride()
            name = self._new_name(result)
            options = {"dtype": result.dtype, "device": result.device}
            self.steps.append(_Step(_allocated, layout, options, name))
        else:
            read = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            computed = [(index, each) for index, each in new if not self._is_view(each, read)]
            if isinstance(result, Tensor):
                for _, each in computed:
                    self.steps.append(_Step(func, arguments, keywords, self._new_name(each)))
            elif computed:
                several = self._new_name()
                self.steps.append(_Step(func, arguments, keywords, several))
                for index, each in computed:
                    item = _Step(_item, (several, index), {}, self._new_name(each))
                    self.steps.append(item)
        return result

    def _is_view(self, x: Tensor, read: Sequence[Tensor]) -> bool:
        """Returns whether a result is a view of what an operator has read, and notes it as one."""
        memory = x.untyped_storage()._cdata
        for each in read:
            known = self._values.get(each)
            if known and each.dtype == x.dtype and each.untyped_storage()._cdata == memory:
                view = _view if known.whole in self.inputs else torch.as_strided
                offset = x.storage_offset() - known.offset
                arguments = (known.whole, (*x.shape,), x.stride(), offset)
                name = self._new_name()
                self._values[x] = known._replace(name=name)
                self.steps.append(_Step(view, arguments, {}, name))
                return True
        return False

    def launch(
        self, kernel: Callable[..., Any], arguments: tuple[Any, ...], *, is_compiled: bool
    ) -> Any:
        """Launches a kernel and notes it."""
        names = []
        for each in arguments:
            name = self.name_of(each)
            if isinstance(name, _Name):
                known = self._values[each]
                if (known.address, known.dtype) == (each.data_ptr(), each.dtype):
                    name = known.whole
            names.append(name)
        # Triton would ask for the stream at each launch.
        keywords = {"stream": _STREAM} if is_compiled else {}
        self.steps.append(_Step(kernel, names, keywords, None, launches=True))
        self._launches = True
        try:
            return kernel(*arguments)
        finally:
            self._launches = False


def _merged_views(steps: Sequence[_Step], returned: Sequence[Any]) -> dict[_Name, _Step]:
    """Returns by their names allocated tensors that nobody reads in their own layout, each with the
    first view of all its memory: it is allocated in the layout of that.

    Kernels take addresses, and other views are of the memory.
    """
    allocated = {step.result: step.arguments[0] for step in steps if step.function is _allocated}
    others = [step for step in steps if not (step.launches or step.function in _VIEWS)]
    own = {*returned, *(name for step in others for name in step.names())}
    views: dict[_Name, _Step] = {}
    for step in steps:
        if step.function in _VIEWS and step.arguments[0] in allocated.keys() - own:
            whole, shape, stride, offset = step.arguments
            reach = 1 + sum((size - 1) * by for size, by in zip(shape, stride, strict=True))
            if offset == 0 and reach == prod(shape) == prod(allocated[whole]):
                views.setdefault(whole, step)
    return views


def _compiled(recorder: _Recorder, outputs: MaybeTensors) -> Callable[..., list[Tensor | None]]:
    """Returns the recorded steps as a function of the inputs."""
    returned = [recorder.name_of(each) for each in outputs]
    views = _merged_views(recorder.steps, returned)
    renamed = {step.result: name for name, step in views.items()}
    values: dict[str, Any] = {}

    def text_of(value: Any) -> str:
        if isinstance(value, _Name):
            return str(renamed.get(value, value))
        if isinstance(value, tuple | list):
            return f"[{', '.join(map(text_of, value))}]"
        if value is None or isinstance(value, bool | int):
            return repr(value)
        name = f"v{len(values)}"
        values[name] = torch.empty_strided if value is _allocated else value
        return name

    alive = {text_of(name) for name in returned}
    # From the last to the first, since what is alive is known from behind.
    lines = [f"return {text_of(returned)}"]
    for step in reversed(recorder.steps):
        result = None if step.result is None else text_of(step.result)
        if step.result in renamed or (result is not None and result not in alive):
            continue
        read = set(map(text_of, step.names()))
        if ended := sorted(read - alive):
            lines.append(f"del {', '.join(ended)}")
        alive |= read
        arguments = list(step.arguments)
        if step.result in views:
            arguments[:2] = views[step.result].arguments[1:3]
        texts = [text_of(each) for each in arguments]
        texts += [f"{name}={text_of(value)}" for name, value in step.keywords.items()]
        call = f"{text_of(step.function)}({', '.join(texts)})"
        lines.append(call if result is None else f"{result} = {call}")
    if _STREAM in alive:
        lines.append(f"{_STREAM} = {text_of(_stream)}()")
    body = "\n".join(f"    {line}" for line in reversed(lines))
    exec(f"def replay({', '.join(recorder.inputs)}):\n{body}", values)  # noqa: S102
    made: Callable[..., list[Tensor | None]] = values["replay"]
    return made


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
        with on_device(first):
            if not torch.is_autocast_enabled(first.device.type):
                return recording(*tensors)
            with torch.autocast(first.device.type, enabled=False):
                return recording(*tensors)

    def _recorded(
        self, key: Hashable, tensors: MaybeTensors, settings: Hashable
    ) -> list[Tensor | None]:
        recorder = _Recorder(tensors)
        with rows.launches_by(recorder.launch), recorder:
            outputs = self.function(tensors, settings)
        if recorder.reason is None:
            self.recordings[key] = _compiled(recorder, outputs)
        else:
            self.recordings[key] = lambda *tensors: self.function(tensors, settings)
        return outputs


def _layout(x: Tensor | None) -> Hashable:
    return None if x is None else (x.dtype, x.shape, x.stride(), x.data_ptr() % 16 == 0)

"""A GPU that is none: tensors that say they lie on cuda:0, refuse to meet others, and are computed on the CPU.

What torch would refuse on a machine with a GPU (tensors on two devices, a tensor there as numpy) is refused here, so that the way of a
training or sampling through a GPU can be followed on machines without one. Random streams are the CPU's. CUDA graphs are there too: what
is recorded is not done, a replay repeats it on the same memory, and numbers that Python has looked at stay what they were. What it does
not show: autocast on a GPU (training is in single precision here), what streams do at the same time, and memory that a failed recording
keeps.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

GPU = torch.device("cuda:0")
NEVER_RECORDED = ("_local_scalar_dense", "nonzero", "_unique2", "masked_select", "equal", "allclose", "bincount", "repeat_interleave")
"""Operations that wait for the GPU."""
FROM_PYTHON = (torch.tensor, torch.as_tensor, torch.from_numpy, Tensor.to, Tensor.cuda)
"""What brings values from the CPU's memory."""
RECORDED: list[Graph] = []
"""The graph that is recorded, if any."""


class Graph:
    """operations: function, arguments, results."""

    def __init__(self) -> None:
        self.operations: list[tuple[Any, tuple, dict, Any]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}

    def note(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """Do it for the shapes of its results; what it writes over is kept."""
        for x in tree_flatten((args, kwargs))[0]:
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in self.before:
                whole = torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage())
                self.before[x.untyped_storage().data_ptr()] = whole, whole.clone()
        found = func(*args, **kwargs)
        self.operations.append((func, args, kwargs, found))
        return found

    def replay(self) -> None:
        for func, args, kwargs, found in self.operations:
            again = func(*args, **kwargs)
            for own, x in zip(tree_flatten(found)[0], tree_flatten(again)[0], strict=True):
                if isinstance(own, Tensor) and own.data_ptr() != x.data_ptr():
                    own.copy_(x)


class Stream:
    """waited: for which streams, in this order."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.device, self.waited = device, []

    def wait_stream(self, other: Stream) -> None:
        self.waited.append(other)


USUAL = Stream()
STREAMS = [USUAL]
"""The current one is the last."""


DEVICES: list[torch.device] = []
"""The current one is the last."""


@contextmanager
def on_device(device: torch.device) -> Iterator[None]:
    DEVICES.append(device)
    try:
        yield
    finally:
        DEVICES.pop()


@contextmanager
def current(stream: Stream) -> Iterator[None]:
    before = len(STREAMS)
    STREAMS.append(stream)
    try:
        yield
    finally:
        del STREAMS[before:]


@contextmanager
def recorded(graph: Graph, stream: Stream) -> Iterator[None]:
    """Nothing is done within the block. As torch's, where recording failed its end fails too, and the stream is not left."""
    RECORDED.append(graph)
    STREAMS.append(stream)
    try:
        yield
        STREAMS.pop()
    except BaseException as error:
        raise RuntimeError("operation failed due to a previous error during capture\nFor debugging consider more.") from error
    finally:
        RECORDED.pop()
        for whole, values in graph.before.values():
            whole.copy_(values)


def _done(func: Any, args: tuple, kwargs: dict) -> Any:
    return RECORDED[-1].note(func, args, kwargs) if RECORDED else func(*args, **kwargs)


def _permitted(this: bool) -> None:
    if not this:
        raise RuntimeError("operation not permitted when stream is capturing")


class OnGpu(Tensor):
    """held: the same on the CPU. To torch's own code it is of the CPU, which alone it has."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OnGpu:
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        return Tensor._make_wrapper_subclass(cls, held.shape, **layout, device="cpu")

    def __init__(self, held: Tensor) -> None:
        self.held = held.detach()

    def __repr__(self) -> str:
        return f"OnGpu({self.held})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func == Tensor.device.__get__:
            return GPU
        if func == Tensor.data.__set__:  # Other memory for the same tensor.
            args[0].held = args[1].held
            return None
        if func == Tensor.data_ptr:
            return args[0].held.data_ptr()
        if func in (Tensor.numpy, Tensor.__array__):
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first.")
        where = [x for x in (*args[1:], kwargs.get("device")) if isinstance(x, (torch.device, str))]
        if func is Tensor.cpu or (func is Tensor.to and torch.device("cpu") in where):
            _permitted(not RECORDED)
            return args[0].held.clone()
        if where:
            cpu = torch.device("cpu")
            args = tuple(cpu if isinstance(x, torch.device) else x for x in args)
            kwargs = {**kwargs, **({"device": cpu} if "device" in kwargs else {})}
        return super().__torch_function__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs, name = kwargs or {}, func._schema.name
        others = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor) and not isinstance(x, cls) and x.dim()]
        # A lone number of the CPU goes into an operation, which keeps it as it is; a copy of it waits.
        alone = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor) and not isinstance(x, cls)]
        steps = others[0] if name == "aten::add" and len(others) == 1 else None
        if steps is not None and steps.dtype == args[0].dtype == torch.int64 and steps.numel() == steps.shape[0] == args[0].shape[0]:
            others = []  # (M, 1, ...): what torch.func.vmap makes on the device of an embedding's indices, which it takes for the CPU.
        if others and name != "aten::copy_":
            raise RuntimeError(f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu, in {name}")
        masks = name in ("aten::index", "aten::index_put") and any(x is not None and x.dtype == torch.bool for x in args[1])
        drawn = torch.Tag.nondeterministic_seeded in func.tags
        copied = alone and name == "aten::copy_"
        waits = name.removeprefix("aten::") in NEVER_RECORDED
        _permitted(not RECORDED or not (others or copied or masks or drawn or waits))
        kept = {id(x): x.clone() for x in alone} if RECORDED else {}
        given, named = tree_map(lambda x: x.held if isinstance(x, cls) else kept.get(id(x), x), (args, kwargs))
        found = _done(func, given, named)
        if name == "aten::copy_" and not isinstance(args[0], cls):
            return args[0]
        return return_and_correct_aliasing(func, args, kwargs, tree_map(lambda x: cls(x) if isinstance(x, Tensor) else x, found))


class _Placed(TorchFunctionMode):
    """What is made on the GPU, or moved there."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        named = [x for x in (*args, kwargs.get("device")) if isinstance(x, torch.device | str)]
        placed = [x for x in named if str(x).startswith("cuda")]
        given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, OnGpu)]
        if not placed or given or func is torch._C._nn._parse_to:
            return func(*args, **kwargs)
        args = tuple(torch.device("cpu") if isinstance(x, torch.device) else x for x in args)
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        _permitted(not RECORDED or (func not in FROM_PYTHON and kwargs.get("generator") is None))
        made = _done(lambda *args, **kwargs: _own(func(*args, **kwargs)), args, kwargs)
        return OnGpu(made) if isinstance(made, Tensor) else made


def _own(made: Any) -> Any:
    return made.clone() if isinstance(made, Tensor) else made


class _Random(torch.Generator):
    def __new__(cls, device: torch.device | str = "cpu") -> _Random:
        return super().__new__(cls, "cpu")


@contextmanager
def pretended_gpu() -> Iterator[None]:
    """Within the block a machine with one GPU."""
    found = {
        "is_available": True,
        "device_count": 1,
        "is_bf16_supported": False,
        "get_device_name": "pretended",
        "max_memory_allocated": 2**30,
    }
    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with pytest.MonkeyPatch.context() as patch, _Placed():
            for name, value in found.items():
                patch.setattr(torch.cuda, name, lambda *args, value=value: value)
            patch.setattr(torch, "Generator", _Random)
            of_cuda = {"CUDAGraph": Graph, "graph": recorded, "Stream": Stream, "stream": current, "device": on_device}
            for name, value in (*of_cuda.items(), ("current_stream", lambda device: STREAMS[-1])):
                patch.setattr(torch.cuda, name, value)
            yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(overwrite)

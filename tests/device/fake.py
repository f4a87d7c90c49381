"""An accelerator that is not there: tensors that say they are on `fake:0` and are computed on the
CPU, and that are as strict as an accelerator's.

It is a backend of PyTorch's own (PrivateUse1), so everything in between is real: dispatch,
autograd, `Module.to`, factories with `device=`, autocast, `torch.accelerator`, and the refusal of
`pin_memory`. On top of it this file refuses tensors of two devices in one operation and, where
rectiflow asks for it, float64, which Apple's accelerators do not have. It notes what makes a real
accelerator and its CPU wait for each other, as `torch.cuda.set_sync_debug_mode` does.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import rectiflow

aten = torch.ops.aten
NAME = "fake"
PACKAGE = rectiflow.__path__[0] + "/"
WAITING = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten.repeat_interleave.Tensor,
    aten._unique2.default,
    aten.unique_dim.default,
}
DOUBLE = (torch.float64, torch.complex128)
RESHAPING = {aten.resize_.default, aten.set_.source_Tensor, aten.t_.default}
# Indices may be on the CPU, and wait; numbers of no dimension become arguments of a kernel.
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default}
SCALARS = {aten.copy_.default, aten.fill_.Tensor, aten._foreach_mul_.Tensor, *INDEXING}


@dataclass
class Log:
    """What happened on the device while it was watched."""

    waits: Counter[str] = field(default_factory=Counter)
    """What waited for the device, and where in rectiflow: `"_local_scalar_dense at feed.py:12"`."""


_logs: list[Log] = []
_pinned: set[int] = set()


class FakeTensor(torch.Tensor):
    """A tensor on `fake:0`, whose numbers are `raw`, on the CPU."""

    raw: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, raw: Tensor, requires_grad: bool = False) -> FakeTensor:
        if isinstance(raw, FakeTensor):  # as accelerate makes a parameter of a parameter's class
            raw = raw.raw
        if raw.device.type == "meta":  # as accelerate does where weights wait elsewhere
            return torch.nn.Parameter(raw, requires_grad)  # type: ignore[return-value]
        made: FakeTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            raw.size(),
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=torch.device(NAME, 0),
            requires_grad=requires_grad,
        )
        made.raw = raw
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})

    def __deepcopy__(self, memo: dict[int, Any]) -> FakeTensor:
        if id(self) not in memo:
            made = FakeTensor(self.raw.detach().clone(), self.requires_grad)
            if getattr(self, "_is_param", False):
                made._is_param = True
            memo[id(self)] = made
        return memo[id(self)]

    def data_ptr(self) -> int:
        return self.raw.data_ptr()

    def untyped_storage(self) -> Any:
        return self.raw.untyped_storage()

    def tolist(self) -> Any:
        _wait("tolist")
        return self.raw.tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError(f"can't convert {NAME}:0 device type tensor to numpy. Use Tensor.cpu()")

    def __repr__(self, **_: Any) -> str:
        return f"{self.raw!r}, device='{NAME}:0'"


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    leaves: list[Tensor] = []
    plain, named = _plain(args, leaves), {k: _plain(v, leaves) for k, v in kwargs.items()}
    fakes = [leaf for leaf in leaves if isinstance(leaf, FakeTensor)]
    asked = kwargs.get("device")
    _check(func, leaves, fakes, kwargs)
    if func is aten._to_copy.default and asked is not None and asked.type == "cpu":
        _wait("copy to the CPU")
    if func is aten.copy_.default:
        _copying(*args)
    if func in WAITING:
        _wait(func.name())
    there = asked.type == NAME if asked is not None else bool(fakes)
    if func is aten._pin_memory.default or func is aten.pin_memory.default:
        raise RuntimeError("cannot pin 'fakeFloatType' only dense CPU tensors can be pinned")
    found = func(*plain, **named)
    assert func not in RESHAPING, func
    return _wrapped(found, fakes) if there else found


def _plain(value: Any, leaves: list[Tensor]) -> Any:
    """An argument for the CPU; its tensors are added to `leaves`. (pytree does this slowly.)"""
    if isinstance(value, Tensor):
        leaves.append(value)
        return value.raw if isinstance(value, FakeTensor) else value
    if isinstance(value, list | tuple):
        return type(value)([_plain(part, leaves) for part in value])
    if isinstance(value, torch.device) and value.type == NAME:
        return torch.device("cpu")
    return value


def _wrapped(value: Any, fakes: list[FakeTensor]) -> Any:
    """A result, on the device; an argument that is returned is the same tensor still."""
    if isinstance(value, list | tuple):
        return type(value)([_wrapped(part, fakes) for part in value])
    if not isinstance(value, Tensor):
        return value
    for fake in fakes:
        if fake.raw is value:
            return fake
    if value.dtype in DOUBLE and not any(fake.dtype in DOUBLE for fake in fakes):
        _refuse_double()
    return FakeTensor(value)


def _refuse_double() -> None:
    """Unless diffusers or PyTorch's gradient scaler ask, which know Apple's by name."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if "/diffusers/" in name or "/torch/amp/" in name:
            return
        if name.startswith(PACKAGE):
            raise TypeError(f"Cannot make a {NAME} tensor of float64: the device has none")
        frame = frame.f_back


def _check(func: Any, leaves: list[Any], fakes: list[FakeTensor], kwargs: Any) -> None:
    """What an accelerator refuses."""
    generator = kwargs.get("generator")
    if generator is not None and generator.device.type != NAME:
        raise RuntimeError(f"Expected a '{NAME}' device type for generator but found 'cpu'")
    others = [x for x in leaves if isinstance(x, Tensor) and not isinstance(x, FakeTensor)]
    if not (fakes and others) or func is aten.copy_.default:
        return
    if func in INDEXING and all(x.dtype in (torch.int64, torch.bool) for x in others):
        _wait(f"{func.name()} with indices on the CPU")
        return
    scalars = torch.Tag.pointwise in func.tags or func in SCALARS or "_foreach" in func.name()
    if not (scalars and all(x.ndim == 0 for x in others)):
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, "
            f"{NAME}:0 and cpu! (in {func})"
        )


def _copying(target: Tensor, source: Tensor, non_blocking: bool = False) -> None:
    if not isinstance(target, FakeTensor):
        if not (non_blocking and is_pinned(target)):
            _wait("copy to the CPU")
    elif not isinstance(source, FakeTensor):
        if not non_blocking:
            _wait("copy to the device")
        elif source.ndim and id(source.untyped_storage()._cdata) and not is_pinned(source):
            _wait("copy of memory that is not pinned")


def is_pinned(tensor: Tensor) -> bool:
    """Whether a tensor's memory is pinned, as far as this device knows."""
    return tensor.untyped_storage().data_ptr() in _pinned


def _wait(what: str) -> None:
    if not _logs:
        return
    frame: Any = sys._getframe(1)
    while frame is not None and not frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    where = "elsewhere"
    if frame is not None:
        where = f"{frame.f_code.co_filename.removeprefix(PACKAGE)}:{frame.f_lineno}"
    for log in _logs:
        log.waits[f"{what} at {where}"] += 1


@contextmanager
def watched() -> Iterator[Log]:
    """Write down what waits, in any thread."""
    log = Log()
    _logs.append(log)
    try:
        yield log
    finally:
        _logs.remove(log)


class Module:
    """`torch.fake`."""

    available = False
    seeds: list[int] = []  # noqa: RUF012

    def is_available(self) -> bool:
        return self.available

    def is_initialized(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed(self, seed: int) -> None:
        self.seeds.append(seed)

    manual_seed_all = manual_seed

    def device_count(self) -> int:
        return int(self.available)

    def current_device(self) -> int:
        return 0

    def set_device(self, _: Any) -> None:
        pass

    def get_rng_state(self, *_: Any) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, *_: Any) -> None:
        torch.set_rng_state(state)

    def empty_cache(self) -> None:
        pass

    def synchronize(self, *_: Any) -> None:
        pass

    def mem_get_info(self, *_: Any) -> tuple[int, int]:
        return 2**33, 2**34

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


_state = SimpleNamespace(module=None, libraries=[])


def _register() -> Module:
    """Once a process: a backend cannot be taken back, but says that it is not available."""
    if _state.module is None:
        from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

        _state.module = Module()
        _setup_privateuseone_for_python_backend(NAME, backend_module=_state.module)
        library = torch.library.Library("_", "IMPL")
        library.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
        library.fallback(lambda func, *args, **kwargs: _run(func, args, kwargs), "PrivateUse1")
        # `torch.tensor(..., device=)` copies with subclasses' dispatch switched off, where PyTorch
        # finds no fallback for them.
        direct = torch.library.Library("aten", "IMPL")
        for name in ("copy_", "lift_fresh", "detach", "alias"):
            func = getattr(aten, name).default
            direct.impl(name, lambda *a, func=func, **k: _run(func, a, k), "PrivateUse1")
        # It would be made empty, and then be resized.
        for overload in ("default", "start", "start_step"):
            func = getattr(aten.arange, overload)
            direct.impl(func.name(), lambda *a, func=func, **k: _run(func, a, k), "PrivateUse1")
        _state.libraries = [library, direct, _autocast()]
    return _state.module


def _autocast() -> torch.library.Library:
    """The operations that autocast brings to a lower precision on every device."""
    library = torch.library.Library("aten", "IMPL", "AutocastPrivateUse1")
    key = torch._C.DispatchKey.AutocastPrivateUse1

    def lower(func: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            dtype = torch.get_autocast_dtype(NAME)

            def cast(x: Any) -> Any:
                floating = isinstance(x, Tensor) and x.is_floating_point()
                return x.to(dtype) if floating and x.device.type == NAME else x

            with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
                return func(*pytree.tree_map(cast, args), **pytree.tree_map(cast, kwargs))

        return run

    for name in (
        "linear",
        "matmul",
        "mm",
        "bmm",
        "addmm",
        "baddbmm",
        "scaled_dot_product_attention",
    ):
        library.impl(name, lower(getattr(aten, name).default))
    library.impl("conv2d", lower(aten.conv2d.default))
    return library


def _pin(tensor: Tensor, *_: Any) -> Tensor:
    if isinstance(tensor, FakeTensor):
        raise RuntimeError("cannot pin 'fakeFloatType' only dense CPU tensors can be pinned")
    made = tensor.detach().clone()
    _state.keep.append(made)
    _pinned.add(made.untyped_storage().data_ptr())
    return made


@contextmanager
def fake_accelerator() -> Iterator[torch.device]:
    """The machine has an accelerator while the block lasts: `torch.accelerator` and accelerate say
    so."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    module = _register()
    device = torch.device(NAME, 0)
    _state.keep = []

    def pinning(factory: Any) -> Any:
        def make(*size: Any, pin_memory: bool = False, **kwargs: Any) -> Tensor:
            made: Tensor = factory(*size, **kwargs)
            return _pin(made) if pin_memory else made

        return make

    states = (AcceleratorState, GradientState, PartialState)
    for state in states:
        state._reset_state()
    module.available = True
    try:
        with (
            mock.patch.object(PartialState, "default_device", device),
            mock.patch.object(torch.Tensor, "pin_memory", _pin),
            mock.patch.object(torch, "empty", pinning(torch.empty)),
            mock.patch.object(torch, "zeros", pinning(torch.zeros)),
        ):
            yield device
    finally:
        module.available = False
        _pinned.clear()
        _state.keep = []
        for state in states:
            state._reset_state()

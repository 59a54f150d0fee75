"""What a tensor says of its device and how it goes to another: the methods of ``torch.Tensor``
that torch answers before any operator is dispatched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _device
from torch.utils._mode_utils import no_dispatch

from cuda_twin.counts import Counting
from cuda_twin.dispatch import note_copy
from cuda_twin.placement import CUDA, Placement

BASE: Any = torch._C.TensorBase


class Transfers:
    def __init__(self, placement: Placement, counting: Counting):
        self.placement = placement
        self.counting = counting

    def install(self) -> None:
        """Put these in the place of torch's own."""
        # Which functions torch.device("meta") acts on is looked up once and kept: torch's own.
        _device._device_constructors()
        tensor: Any = Tensor
        place = self.placement
        tensor.device = property(place.device_of)
        tensor.is_cuda = property(place.on_cuda)
        tensor.is_cpu = property(lambda x: place.device_of(x).type == "cpu")
        tensor.get_device = lambda x: 0 if place.on_cuda(x) else BASE.get_device(x)
        tensor.to = self._to()
        tensor.cuda = lambda x, device=None, non_blocking=False, **more: x.to(
            CUDA, non_blocking=non_blocking
        )
        tensor.cpu = lambda x, **more: x.to("cpu")
        tensor.pin_memory = lambda x, device=None: self._pinned(x)
        tensor.is_pinned = lambda x, device=None: x in place.pinned
        tensor.tolist = self._read(BASE.tolist)
        tensor.numpy = self._refuse_numpy(BASE.numpy)
        tensor.new_tensor = self._made_beside(BASE.new_tensor)
        tensor.__deepcopy__ = self._copied(Tensor.__deepcopy__)
        torch.tensor = self._made(torch.tensor)
        torch.as_tensor = self._made(torch.as_tensor)
        torch.asarray = self._made(torch.asarray)

    def moved(self, x: Tensor, *, to_cuda: bool, non_blocking: bool = False) -> Tensor:
        """``x`` on the other device. Its gradient goes the way back."""
        return _Moved.apply(x, self, to_cuda, non_blocking)

    def copied_over(self, x: Tensor, *, to_cuda: bool, non_blocking: bool) -> Tensor:
        with no_dispatch():
            there = x.detach().clone()
        if to_cuda:
            self.placement.cuda.add(there)
        # A copy to the host goes to memory that was not pinned.
        host = x if to_cuda else there
        note_copy(self.counting, self.placement, host, to_cuda=to_cuda, waits=not non_blocking)
        return there

    def _to(self) -> Callable[..., Tensor]:
        plain = BASE.to

        def to(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if not self.placement.is_of_twin(x):
                return plain(x, *args, **kwargs)
            copy = kwargs.pop("copy", False)
            if args and isinstance(args[0], Tensor):
                args = (args[0].device, args[0].dtype, *args[1:])
            elif args and type(args[0]) is int:
                args = (torch.device("cuda", args[0]), *args[1:])
            parsed = torch._C._nn._parse_to(*args, **kwargs)
            device, dtype, non_blocking, memory_format = parsed
            if device is not None and device.type not in ("cpu", "cuda"):
                return plain(x, *args, **kwargs)
            to_cuda = device is not None and device.type == "cuda"
            if device is not None and to_cuda != self.placement.on_cuda(x):
                x, copy = self.moved(x, to_cuda=to_cuda, non_blocking=non_blocking), False
            options = {} if memory_format is None else {"memory_format": memory_format}
            return plain(x, x.dtype if dtype is None else dtype, copy=copy, **options)

        return to

    def _pinned(self, x: Tensor) -> Tensor:
        if x in self.placement.pinned:
            return x
        pinned = x.clone()
        self.placement.pinned.add(pinned)
        return pinned

    def _read(self, plain: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
        def tolist(x: Tensor) -> Any:
            return plain(x.to("cpu") if self.placement.on_cuda(x) else x)

        return tolist

    def _refuse_numpy(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        def numpy(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self.placement.on_cuda(x):
                raise TypeError(
                    "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy "
                    "the tensor to host memory first."
                )
            return plain(x, *args, **kwargs)

        return numpy

    def _copied(self, plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def __deepcopy__(x: Tensor, memo: Any) -> Tensor:
            copy = plain(x, memo)
            if self.placement.on_cuda(x):
                self.placement.cuda.add(copy)
            return copy

        return __deepcopy__

    def _made(self, plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """From numbers or arrays, on the host and then moved, as CUDA does it."""

        def make(
            data: Any,
            *,
            dtype: Any = None,
            device: Any = None,
            pin_memory: bool = False,
            requires_grad: bool = False,
            **more: Any,
        ) -> Tensor:
            if isinstance(data, Tensor):
                device = data.device if device is None else device
                made = data.detach().clone() if plain is _TENSOR else data
                made = made if dtype is None else made.to(dtype)
            else:
                made = plain(data, dtype=dtype, **more)
            if pin_memory:
                made = self._pinned(made)
            made = made if device is None else made.to(device)
            return made.requires_grad_() if requires_grad else made

        return make

    def _made_beside(self, plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def new_tensor(x: Tensor, data: Any, *, device: Any = None, **more: Any) -> Tensor:
            return plain(x, data, **more).to(x.device if device is None else device)

        return new_tensor


_TENSOR = torch.tensor


class _Moved(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, transfers: Transfers, to_cuda: bool, non_blocking: bool
    ) -> Tensor:
        ctx.back = {"to_cuda": not to_cuda, "non_blocking": non_blocking}
        ctx.transfers = transfers
        return transfers.copied_over(x, to_cuda=to_cuda, non_blocking=non_blocking)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.transfers.copied_over(grad, **ctx.back), None, None, None

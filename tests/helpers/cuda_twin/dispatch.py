"""Every operator passes by here: is it asked of one device, and what does that cost?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cuda_twin import products, varlen
from cuda_twin.counts import Counting
from cuda_twin.placement import Placement, Storages

# Memory that nobody has written yet. It is NaN here, so that reading it shows.
UNWRITTEN = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
# Nothing runs on the device for these, views aside.
NO_KERNEL = UNWRITTEN | {
    "set_", "resize_",
    "lift_fresh", "_unsafe_view", "is_pinned", "is_same_size", "result_type", "_local_scalar_dense",
    "split_with_sizes", "unbind", "split", "detach_", "_has_compatible_shallow_copy_type",
    "_reshape_alias",
}  # fmt: skip
# The host has to know a size or a value before it can go on.
WAITS = {
    "_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2", "equal",
    "unique_consecutive", "is_nonzero", "bincount",
}  # fmt: skip
INDEXING = {"index", "index_put_", "index_put", "_index_put_impl_", "_unsafe_index_put"}


class Dispatch(TorchDispatchMode):
    """One for each thread. frozen: storages of weights that do not train, whose casts are told
    apart."""

    def __init__(self, placement: Placement, counting: Counting, frozen: Storages):
        super().__init__()
        self.placement = placement
        self.counting = counting
        self.frozen = frozen

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        asked = None if kwargs.get("device") is None else torch.device(kwargs["device"]).type
        ours = all(map(self.placement.is_of_twin, tensors))
        if asked not in (None, "cpu", "cuda") or not (ours or asked == "cuda"):
            return func(*args, **kwargs)
        if func.namespace == "fusedgrpo":
            with self:  # what our operators are made of is looked at as well
                return _body(func)(*args, **kwargs)
        op = func._schema.name.split("::")[1]
        places = [self.placement.on_cuda(x) for x in tensors]
        on_cuda = any(places)
        if asked is not None:
            kwargs["device"] = torch.device("cpu")
            # Inside torch the device of results is that of the tensors they come from.
            on_cuda |= asked == "cuda"
        if any(places):
            self._check_one_device(func, op, args, tensors, places)
        pinned = bool(kwargs.pop("pin_memory", False)) and not on_cuda
        if op == "copy_" and places[0] != places[1]:
            self._note_copy(args, kwargs, to_cuda=places[0])
            return func(*args, **kwargs)
        if op == "record_stream":
            return None
        out = self._computed(func, op, args, kwargs)
        results = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        for x in results:
            if on_cuda:
                self.placement.cuda.add(x)
                if op in UNWRITTEN and x.is_floating_point():
                    x.fill_(torch.nan)
            elif pinned:
                self.placement.pinned.add(x)
        if on_cuda:
            self._note(func, op, args, kwargs, tensors, results)
        return out

    def _computed(self, func: Any, op: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        with self.placement.hidden():
            if products.is_product(op, func._overloadname):
                return products.product(op, _by_name(func, args, kwargs))
            if func.namespace == "torch_attn":
                return varlen.attention(op, _by_name(func, args, kwargs))
            return func(*args, **kwargs)

    def _check_one_device(
        self,
        func: Any,
        op: str,
        args: Sequence[Any],
        tensors: Sequence[Tensor],
        places: Sequence[bool],
    ) -> None:
        """A tensor of the CPU without dimensions is a number, and may be anywhere."""
        strangers = [x for x, cuda in zip(tensors, places, strict=True) if not cuda and x.dim()]
        if op == "copy_" or not strangers:
            return
        if op in INDEXING and all(x is not args[0] for x in strangers):
            self.counting.note("copies", "pageable to the device, of an index")
            self.counting.note("waits", f"{op} by an index on the host")
            return
        shapes = ", ".join(
            f"{'cuda:0' if cuda else 'cpu'} {x.dtype} {list(x.shape)}"
            for x, cuda in zip(tensors, places, strict=True)
        )
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, cuda:0 "
            f"and cpu! {func} of {shapes}"
        )

    def _note_copy(self, args: Sequence[Any], kwargs: Mapping[str, Any], *, to_cuda: bool) -> None:
        host = args[1] if to_cuda else args[0]
        non_blocking = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
        note_copy(self.counting, self.placement, host, to_cuda=to_cuda, waits=not non_blocking)

    def _note(
        self,
        func: Any,
        op: str,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        tensors: Sequence[Tensor],
        results: Sequence[Tensor],
    ) -> None:
        if op in WAITS or (op == "repeat_interleave" and kwargs.get("output_size") is None):
            self.counting.note("waits", op)
        if op in INDEXING and any(_is_mask(x) for x in args[1]):
            self.counting.note("waits", f"{op} by a mask")
        nothing = bool(results) and not any(x.numel() for x in results)
        if not (func.is_view or op in NO_KERNEL or nothing):
            self.counting.note("launches", func._schema.name)
        if op == "_to_copy" and results[0].dtype != tensors[0].dtype:
            what = "frozen " if tensors[0] in self.frozen else ""
            dtypes = f"{tensors[0].dtype} to {results[0].dtype}".replace("torch.", "")
            self.counting.note("casts", what + dtypes)


def note_copy(
    counting: Counting, placement: Placement, host: Tensor, *, to_cuda: bool, waits: bool
) -> None:
    """One between the devices. host: the tensor of the two that is on the CPU."""
    kind = "pinned" if host in placement.pinned else "pageable"
    where = "to the device" if to_cuda else "to the host"
    if not host.numel():
        return
    counting.note("copies", f"{kind} {where}")
    # Into pageable memory it is not done before the device is, whatever was asked for.
    if waits or (kind == "pageable" and not to_cuda):
        counting.note("waits", f"a copy {where}")


def _is_mask(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8)


def _by_name(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of an operator, those left out with their defaults."""
    arguments = func._schema.arguments
    given = {a.name: a.default_value for a in arguments if a.has_default_value()}
    return given | {a.name: value for a, value in zip(arguments, args, strict=False)} | dict(kwargs)


def _body(func: Any) -> Any:
    """The Python function behind one of our operators."""
    return torch._library.custom_ops.OPDEFS[func._schema.name]._init_fn

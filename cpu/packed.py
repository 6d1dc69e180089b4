"""Weights in the order of an operator, which everybody else sees as they were.

A layer's tensor whose values are in an Order stays the same object, of the class Packed: whatever
looks at it brings its values back first, and the layer is plain until the next text begins."""
from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any
from weakref import ref

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch._C import _disabled_torch_function_impl
from torch.utils._pytree import tree_leaves

from quantize import PLAIN

# what may be asked of a tensor whose values are elsewhere
METADATA = {
    Tensor.shape.__get__, Tensor.dtype.__get__, Tensor.device.__get__, Tensor.is_meta.__get__,
    Tensor.ndim.__get__, Tensor.nbytes.__get__, Tensor.itemsize.__get__, Tensor.element_size,
    Tensor.requires_grad.__get__, Tensor.is_floating_point, Tensor.dim, Tensor.size, Tensor.numel,
    Tensor.__len__,  # loading asks for it
}


class Order:
    """The values of a layer's tensors of these names for an operator, which gives the memory of
    those free. plain(tensors, name): one as it was. A copy of a layer has none, and is plain."""

    @torch.inference_mode(False)
    def __init__(
        self, layer: nn.Module, names: tuple[str, ...], tensors: dict[str, Tensor],
        plain: Callable[[dict[str, Tensor], str], Tensor],
    ):
        self.layer, self.names, self.plain = ref(layer), names, plain
        self.shared = layer.shared  # an embedding reads the tensor all the time
        self.tensors = {name: nn.Parameter(x, False) for name, x in tensors.items()}
        for name in names:
            x = own(layer)[name]
            x.order, x.key, x.kind = self, name, type(x)
            x.__class__ = Packed
            if not layer.shared:
                nothing = torch.zeros((), dtype=x.dtype, device="cpu").expand(x.shape)
                unseen(Tensor.data.__set__, x, nothing)
        PLAIN.discard(layer)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(None), ()


class Packed(Tensor):
    """A tensor whose values are in an Order until somebody looks."""

    order: Order
    key: str  # in its layer
    kind: type  # what it was

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        looked_at = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Packed)]
        if func in METADATA or func is F.embedding and looked_at[0].order.shared:
            return unseen(func, *args, **kwargs)
        for x in looked_at:
            x.unpack()
        return func(*args, **kwargs)

    @torch.inference_mode(False)
    @torch.no_grad()
    def unpack(self) -> None:
        """An interrupt anywhere leaves it to the next look: a layer without an order is plain."""
        layer = self.order.layer()
        if layer is not None:
            unpack(layer)
        unseen(Tensor.data.__set__, self, self.order.plain(self.order.tensors, self.key))
        self.__class__ = self.kind
        del self.order, self.key, self.kind

    def __deepcopy__(self, memo: dict) -> Tensor:
        self.unpack()
        return copy.deepcopy(self, memo)

    @property
    def _is_param(self) -> bool:  # what isinstance(x, nn.Parameter) asks for
        return self.kind is nn.Parameter


def unseen(func: Callable, *args: Any, **kwargs: Any) -> Any:
    """What a function does to tensors, Packed or not; no interrupt leaves that switched off."""
    return _disabled_torch_function_impl(func, (Tensor,), args, kwargs)


def own(layer: nn.Module) -> dict[str, Tensor | None]:
    return layer._parameters | layer._buffers


def unpack(layer: nn.Module) -> None:
    """A layer decodes with what it shows, from now on until the next text."""
    if layer.layout is not None:
        PLAIN.add(layer)
    layer.order = None


def can_pack(layer: nn.Module, names: tuple[str, ...]) -> bool:
    """Whether nobody else has a view of a layer's tensors, or wants gradients."""
    for name in names:
        x = own(layer).get(name)
        if type(x) not in (Tensor, nn.Parameter, Packed) or x.requires_grad:
            return False
        n_users = torch._C._storage_Use_Count(x.untyped_storage()._cdata)
        if n_users > 2 or x.is_inference() or not x.is_cpu:  # 2: the tensor, and who asks
            return False
    return True


def packed_of(layer: nn.Module) -> dict[str, Tensor] | None:
    """The tensors that a layer's operator reads; None: the layer's own, where others were put in
    the place of those, are plain from now on. While compiling, nobody looks at them."""
    order = layer.order
    if torch.compiler.is_compiling():
        return None if order is None else order.tensors
    tensors = own(layer)
    for name in () if order is None else order.names:
        if getattr(tensors.get(name), "order", None) is not order:
            order = None
    if order is None:
        unpack(layer)
        return None
    return order.tensors

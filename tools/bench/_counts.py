"""Counts of kernels and of the bytes that they read and write, without a GPU and without computing anything.

Tensors have shapes but no data. An operator of eager code is a kernel that reads its inputs and writes its outputs.
Compiled code is counted after torch.compile has fused it by its rules for GPUs: a kernel reads each of its inputs once
and writes each of its outputs once. Attention, and RMS norm in eager code, are counted as the fused kernels of a GPU.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._functorch import config as autograd
from torch._inductor import config as inductor
from torch._inductor import graph
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PRODUCTS, ATTENTION, ELEMENTWISE, LOSS = "matrix products", "attention", "elementwise", "loss"
KINDS = (PRODUCTS, ATTENTION, ELEMENTWISE, LOSS)
_PRODUCTS = {"mm", "addmm", "bmm"}
_OVERWRITE_FIRST = {"copy_", "fill_", "zero_"}  # operators that do not read their first input
_NO_KERNEL = {"_unsafe_view", "lift_fresh", "_local_scalar_dense", "empty", "empty_like", "empty_strided", "new_empty"}


class KernelCounts(TorchDispatchMode):
    """Number of kernels, their bytes, and copies from host to device of what runs within this context."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.clear()
        self._part: str | None = None
        self._in_compiled_code = False

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let torch.compile compile within this context, too."""
        return True

    def clear(self) -> None:
        self.kernels, self.bytes, self.host_copies = Counter[str](), Counter[str](), 0

    @contextmanager
    def part(self, kind: str) -> Iterator[None]:
        """Count everything within this context as of one kind."""
        self._part = kind
        yield
        self._part = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name, kind, outputs = func.overloadpacket.__name__, _kind(func), _tensors(result)
        is_view = any(value.alias_info and not value.alias_info.is_write for value in func._schema.returns)
        if name == "_to_copy" and args[0].device.type == "cpu" != result.device.type:
            self.host_copies += 1
        elif outputs and not (is_view or name in _NO_KERNEL or (self._in_compiled_code and kind == ELEMENTWISE)):
            self.add(kind, _bytes_moved(name, args, kwargs or {}, outputs))
        return result

    def add(self, kind: str, num_bytes: int) -> None:
        """Count one kernel."""
        self.kernels[self._part or kind] += 1
        self.bytes[self._part or kind] += num_bytes

    @contextmanager
    def compiled(self) -> Iterator[None]:
        """Count code of torch.compile: products and attention as operators, everything else as fused kernels."""

        def to_module(lowered: Any) -> SimpleNamespace:
            lowered._update_scheduler()
            sizes = [node.get_read_write_buffers_sizes() for node in lowered.scheduler.nodes if _is_fused(node)]
            return SimpleNamespace(call=lambda inputs: self._call(sizes, lowered.module, inputs), __file__="")

        torch._dynamo.reset()
        with (
            inductor.patch(fx_graph_cache=False, cpu_backend="triton"),
            autograd.patch(enable_autograd_cache=False),
            mock.patch.object(graph.GraphLowering, "compile_to_module", to_module),
        ):
            yield

    def _call(self, sizes: list[int], module: Callable[..., Any], inputs: list[Tensor]) -> Any:
        for num_bytes in filter(None, sizes):
            self.add(ELEMENTWISE, num_bytes)
        self._in_compiled_code = True
        result = module(*inputs)
        self._in_compiled_code = False
        return result


def _kind(operator: Any) -> str:
    name = operator.overloadpacket.__name__
    return PRODUCTS if name in _PRODUCTS else ATTENTION if name.startswith("attention") else ELEMENTWISE


def _is_fused(node: Any) -> bool:
    """Return True for kernels of a compiled graph that are not counted as operators."""
    operator = getattr(node.node, "op_overload", None)
    return operator is None or _kind(operator) == ELEMENTWISE


def _bytes_moved(name: str, args: Any, kwargs: Any, outputs: list[Tensor]) -> int:
    written = sum(map(_num_bytes, outputs))
    if name in ("gather", "embedding"):  # reads the selected elements only
        return _num_bytes(args[2 if name == "gather" else 1]) + 2 * written
    if name == "scatter_add_":
        return _num_bytes(args[2]) + 3 * _num_bytes(args[3])
    read = [args[name in _OVERWRITE_FIRST :], {key: value for key, value in kwargs.items() if key != "out"}]
    return written + sum(map(_num_bytes, _tensors(read)))


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def _num_bytes(tensor: Tensor) -> int:
    """Return the bytes of distinct elements: an expanded dimension counts once."""
    count = tensor.element_size()
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else min(size, 1)
    return count


# Operators that stand for a GPU's fused kernels


def _operator(signature: str, outputs: Callable[..., Any]) -> Any:
    """Define an operator by the shapes of its outputs; tensors without data need no computation."""
    name = signature.split("(", maxsplit=1)[0]
    torch.library.define(f"bipe_bench::{name}", signature.removeprefix(name))
    torch.library.register_fake(f"bipe_bench::{name}", outputs)
    return getattr(torch.ops.bipe_bench, name)


def _with_row_sums(x: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)


_attention = _operator("attention(Tensor q, Tensor k, Tensor v) -> (Tensor, Tensor)", _with_row_sums)
_attention_backward = _operator(
    "attention_backward(Tensor q, Tensor k, Tensor v, Tensor y, Tensor sums, Tensor grad) -> (Tensor, Tensor, Tensor)",
    lambda q, k, v, *_: (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)),
)
_rms_norm = _operator("rms_norm(Tensor x, Tensor weight) -> (Tensor, Tensor)", _with_row_sums)
_rms_norm_grad_input = _operator(
    "rms_norm_grad_input(Tensor x, Tensor weight, Tensor scale, Tensor grad) -> Tensor",
    lambda x, *_: x.new_empty(x.shape),
)
_rms_norm_grad_weight = _operator(
    "rms_norm_grad_weight(Tensor x, Tensor scale, Tensor grad) -> Tensor", lambda x, *_: x.new_empty(x.shape[-1])
)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _attention_gradients(ctx: Any, grad: Tensor, _: Tensor) -> Any:
    return _attention_backward(*ctx.saved_tensors, grad)


def _rms_norm_gradients(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, Any]:
    x, weight, _, scale = ctx.saved_tensors
    return _rms_norm_grad_input(x, weight, scale, grad), _rms_norm_grad_weight(x, scale, grad)


torch.library.register_autograd("bipe_bench::attention", _attention_gradients, setup_context=_save)
torch.library.register_autograd("bipe_bench::rms_norm", _rms_norm_gradients, setup_context=_save)


@contextmanager
def fused_kernels() -> Iterator[None]:
    """Replace torch's attention, and RMS norm in eager code, by operators that are one kernel on any device."""
    decomposed = F.rms_norm

    def attention(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        mixed: Tensor = _attention(q, k, v)[0]
        return mixed

    def rms_norm(x: Tensor, shape: Any, weight: Tensor, eps: float) -> Tensor:
        normed: Tensor = (
            _rms_norm(x, weight)[0] if not torch.compiler.is_compiling() else decomposed(x, shape, weight, eps)
        )
        return normed

    with (
        mock.patch.object(F, "scaled_dot_product_attention", attention),
        mock.patch.object(F, "rms_norm", rms_norm),
    ):
        yield

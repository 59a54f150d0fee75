"""The memory that a model needs on a GPU, from its configuration alone: bytes of weights, adapters,
key-value cache and activations.

Weights are counted on the meta device. Activations are measured: a model of the same architecture
with two and with three decoder layers runs forward and backward on fake tensors, at the number of
tokens in question, and what its allocations would take is extended to all layers.
That is a straight line: each layer adds what it saves, its gradients and its casts. What
does not exist without a GPU has a stand-in (``fake_layers.py``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fusedgrpo.engine.memory.bare_models import (
    adapted_model,
    bare_model,
    compute_dtype,
    fill,
    with_copies,
)
from fusedgrpo.engine.memory.fake_layers import (
    ATTENTION,
    Batch,
    FourBitLinear,
    HeadMemory,
    HeadStandIn,
    Ragged,
    called_by_us,
    four_bit_bytes,
    register_attention,
    rounded,
    sort_with_scratch,
)
from fusedgrpo.engine.memory.liger_kernels import kernels_left_out
from fusedgrpo.engine.memory.storage_tracker import StorageTracker
from fusedgrpo.kernels.launch import tiling
from fusedgrpo.models.adapters.fused_lora import FusedLora
from fusedgrpo.models.liger_layers import put_into
from fusedgrpo.models.loading import enable_checkpointing
from fusedgrpo.models.router import planned_router
from fusedgrpo.models.varlen_attention import varlen_traits

if TYPE_CHECKING:
    from fusedgrpo.config.schema import GRPOConfig


class Weights(NamedTuple):
    """Bytes of the model as loaded, and the sizes of what trains."""

    four_bit: int
    embeddings_and_head: int  # tied ones once
    other: int
    trained: tuple[int, ...]  # elements of each trained parameter
    trained_itemsize: int
    adapter: int  # bytes; 0 where the weights themselves train
    merged: int  # of a copy of all weights that have an adapter, in the dtype of computing
    prepared: int  # of the adapter in that dtype, as our own decoder takes it


class Activations(NamedTuple):
    """Highest bytes above weights, optimizer and gradients, by part of a pass."""

    layers_forward: int
    head_forward: int
    head_backward: int = 0
    layers_backward: int = 0

    @property
    def forward(self) -> int:
        return max(self.layers_forward, self.head_forward)

    @property
    def backward(self) -> int:
        return max(self.head_backward, self.layers_backward)


@dataclass(frozen=True)
class ModelShape:
    """The measures of a causal LM that its memory follows from."""

    layers: int
    hidden: int
    itemsize: int  # of an activation

    @classmethod
    def of(cls, config: GRPOConfig, settings: Any) -> ModelShape:
        text = settings.get_text_config()
        itemsize = compute_dtype(config).itemsize
        return cls(text.num_hidden_layers, text.hidden_size, itemsize)


# --- weights ------------------------------------------------------------------------------------


def count_weights(config: GRPOConfig, settings: Any) -> Weights:
    """Every parameter of the architecture, built without memory."""
    model = bare_model(config, settings)
    quantised = {id(m.weight) for m in model.modules() if isinstance(m, FourBitLinear)}
    head = model.get_output_embeddings()
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding) or m is head}
    four_bit = embeddings = other = 0
    for parameter in model.parameters():  # tied ones once
        if id(parameter) in quantised:
            four_bit += four_bit_bytes(parameter.numel(), config.use_bnb_nested_quant)
        elif id(parameter) in tables:
            embeddings += rounded(parameter.numel() * parameter.itemsize)
        else:
            other += rounded(parameter.numel() * parameter.itemsize)
    if config.finetuning_type == "full":
        trained = tuple(p.numel() for p in model.parameters())
        itemsize = next(model.parameters()).itemsize
        return Weights(four_bit, embeddings, other, trained, itemsize, 0, 0, 0)
    adapted = _adapted(model, _adapter_names(config, settings))
    trained = tuple(config.lora_r * n for m in adapted for n in (m.in_features, m.out_features))
    adapter = sum(rounded(4 * n) for n in trained)
    itemsize = compute_dtype(config).itemsize
    merged = sum(rounded(itemsize * m.in_features * m.out_features) for m in adapted)
    prepared = sum(rounded(itemsize * n) for n in trained)
    return Weights(four_bit, embeddings, other, trained, 4, adapter, merged, prepared)


def _adapter_names(config: GRPOConfig, settings: Any) -> set[str]:
    """Last names of the layers that get an adapter: peft's choice, on a model of one layer."""
    found: Any = adapted_model(config, settings, 1)
    return {name.rsplit(".", 1)[-1] for name in found.targeted_module_names}


def _adapted(model: Any, names: set[str]) -> list[nn.Linear]:
    """The linear layers of a bare model that get an adapter."""
    head = model.get_output_embeddings()
    return [
        m
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and m is not head and name.rsplit(".", 1)[-1] in names
    ]


# --- measuring ----------------------------------------------------------------------------------


class SmallModel:
    """A model of few decoder layers on fake tensors, to be measured at any number of tokens.

    merged: what has an adapter has dense weights, whatever the option.
    """

    device = torch.device("cuda")  # it stands for a model there

    def __init__(self, config: GRPOConfig, settings: Any, layers: int, *, merged: bool = False):
        register_attention()
        model = (with_copies if merged else adapted_model)(config, settings, layers)
        for module in model.modules():
            own: Any = getattr(module, "config", None)
            if hasattr(own, "_attn_implementation"):
                own._attn_implementation_internal = ATTENTION
        self.model = model
        self.causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
        put_into(model, config)
        self.ligers = config.use_liger_kernel
        if config.gradient_checkpointing:
            enable_checkpointing(self.causal_lm)
        self.router = planned_router(self.causal_lm, config.router_aux_loss_coef)
        self.dtype = compute_dtype(config)
        self.adapted = config.finetuning_type == "lora"
        self.four_bit = config.load_in_4bit
        self.varlen = varlen_traits(config.full_determinism)
        self.tracker = StorageTracker({torch.ops.aten.sort.default: sort_with_scratch})
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        with self.fake, self.tracker:
            fill(model)
        self.lora = FusedLora(model)

    def trainable(self) -> list[tuple[str, Tensor]]:
        """Nothing, since nothing changes between two measurements."""
        return []

    @property
    def head_weight(self) -> Tensor:
        return self.causal_lm.get_output_embeddings().weight

    def activations(self, batch: Batch, *, gradients: bool) -> Activations:
        """The memory of one pass over ``batch`` through all layers and the head.

        With gradients: an update, whose gradients count as there before. Without: scoring.
        """
        tracker = self.tracker
        peaks: dict[str, int] = {}
        trained = [p for p in self.model.parameters() if p.requires_grad and gradients]
        self.model.train(gradients)
        V, H = self.head_weight.shape
        head = HeadMemory(
            tracker, peaks, tiling(H, V, self.dtype.itemsize, "cuda"), V, self.dtype, gradients,
            gradients and self.head_weight.requires_grad,
        )  # fmt: skip
        with self._computing(), torch.set_grad_enabled(gradients):
            for parameter in trained:
                parameter.grad = torch.empty_like(parameter)
            before = tracker.live
            tracker.start_peak()
            with self.autocast():
                router = self.router if gradients else None
                routed = {} if router is None else {"output_router_logits": True}
                ragged = Ragged(batch.keys, batch.sequences, self.varlen)
                outputs = self.forward(batch.tokens, fusedgrpo_ragged=ragged, **routed)
                states = outputs.last_hidden_state[0]
                balance: Any = 0
                if router is not None:
                    each = torch.ones(batch.tokens)
                    balance = router.loss(router.sums(outputs.router_logits, each))
                peaks["layers_forward"] = tracker.peak.bytes
                del outputs
                loss = HeadStandIn.apply(states, head, batch) + balance
                del states, balance
            if gradients:
                loss.backward()
                peaks["layers_backward"] = tracker.peak.bytes
        for parameter in trained:
            parameter.grad = None
        return Activations(**{name: size - before for name, size in peaks.items()})

    @contextlib.contextmanager
    def _computing(self) -> Iterator[None]:
        """Layers as the policy has them, their tensors fake and counted."""
        with contextlib.ExitStack() as stack:
            if self.adapted:
                if not self.lora.has_learned:
                    with self.fake, torch.no_grad(), self.autocast(), self.lora.learn():
                        self.forward(1)
                stack.enter_context(self.lora.active())
                if not self.lora.left_to_peft:
                    stack.enter_context(called_by_us(self.model))
            stack.enter_context(self.fake)
            stack.enter_context(self.tracker)
            stack.enter_context(self.kernels())
            yield

    def kernels(self) -> contextlib.AbstractContextManager[None]:
        """Around a forward pass, as ``forward`` has it, and around its backward pass."""
        return kernels_left_out() if self.ligers else contextlib.nullcontext()

    def forward(self, tokens: int, **options: Any) -> Any:
        """The outputs of the decoder for one row of ``tokens`` without padding; ``options`` reach
        its attention."""
        ids, positions = torch.zeros(2, 1, tokens, dtype=torch.int64).unbind()
        with self.kernels():
            return self.causal_lm.get_decoder()(
                input_ids=ids,
                position_ids=positions,
                attention_mask=torch.zeros(1, 1, 1, 1),
                use_cache=False,
                **options,
            )

    def autocast(self) -> Any:
        # Of the tensors' device, which stands for a GPU.
        return torch.autocast("cpu", dtype=self.dtype, enabled=self.dtype != torch.float32)


def straight_line(at: Callable[[int], Any], first: int, second: int, wanted: int) -> Any:
    """A tuple of sizes that grow in a straight line, known at two places, at a third."""
    low, high = at(first), at(second)
    share = (wanted - first) / (second - first)
    return type(low)(*(round(a + (b - a) * share) for a, b in zip(low, high, strict=True)))

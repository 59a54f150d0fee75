"""``Policy``: a causal LM as "tokens in, log-probs of the sampled tokens out"."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from fusedgrpo import stages
from fusedgrpo.kernels import LogProbs, linear_logprob
from fusedgrpo.models import packed_attention as attention
from fusedgrpo.models.adapters.attached import Adapters, has_adapters, unwrapped
from fusedgrpo.models.adapters.fused_lora import FusedLora
from fusedgrpo.models.adapters.lora import does_nothing
from fusedgrpo.models.dropout import as_it_samples, own_dropout, switched_off
from fusedgrpo.models.four_bit import keep_differentiable
from fusedgrpo.models.head import Head, find_head, head_layer, vocabulary_size
from fusedgrpo.models.loading import policy_parts
from fusedgrpo.models.packed_batch import Ids, Layout, PackedBatch, Pair
from fusedgrpo.models.packing_probe import SharedPrompt, choose_layout
from fusedgrpo.models.router import RouterLoss, RouterSums
from fusedgrpo.models.softcap import keep_softcap

if TYPE_CHECKING:
    from fusedgrpo.config.schema import GRPOConfig


log = logging.getLogger("fusedgrpo")


@dataclass(frozen=True, slots=True)
class ReferenceSync:
    """Every so many steps the share ``alpha`` of the policy goes into the reference; ``every`` 0:
    never."""

    every: int = 0
    alpha: float = 0.0

    def is_due(self, step: int) -> bool:
        return self.every > 0 and step % self.every == 0


class Policy:
    """The model that is trained, with its reference.

    model: a transformers causal LM, with peft's adapters in it or not. compute_dtype: the dtype of
    autocast, None to compute in the weights' own, or ``"inherit"`` for what the caller has set. The
    reference policy is the model as it is now. With fresh adapters that is the model with the
    adapters switched off; with ``keep_reference="adapter"`` a copy of the weights that train (for
    adapters that were trained before), with ``keep_reference="model"`` a frozen copy of the model.
    new_adapter: it was made just now.

    shared_prompt: ``"auto"`` forwards each prompt once for all its completions if the model gives
    the same numbers that way, ``"on"`` insists, ``"off"`` packs whole sequences. What came of it is
    ``layout``, for ``PackedBatch.build``. router: the load-balancing loss of a mixture of experts.
    disable_dropout, trains_as_it_samples: what ``training`` switches off. fused_lora: layers with
    plain LoRA compute in one node of autograd for all that share an input, not as peft has them;
    ``lora`` is who sees to it, None where nobody does.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        compute_dtype: torch.dtype | Literal["inherit"] | None = None,
        temperature: float = 1.0,
        keep_reference: Literal["adapter", "model"] | None = None,
        new_adapter: bool = False,
        shared_prompt: SharedPrompt = "auto",
        router: RouterLoss | None = None,
        disable_dropout: bool = False,
        trains_as_it_samples: bool = False,
        fused_lora: bool = True,
    ):
        keep_differentiable(model)
        keep_softcap(model)
        self.model: Any = model
        self.compute_dtype = compute_dtype
        self.temperature = temperature
        self.router = router
        self.disable_dropout = disable_dropout
        self._keeps_reference = keep_reference is not None
        self._new_adapter = new_adapter
        self.trains_as_it_samples = trains_as_it_samples
        self._said_positions = False
        self.adapters = Adapters(model) if has_adapters(model) else None
        self.lora: FusedLora | None = None
        # Of a trainer that is not ours: it wraps weights in ways of its own, and goes backward
        # where we do not see it.
        if fused_lora and self.adapters is not None and compute_dtype != "inherit":
            self.lora = FusedLora(model)
        with stages.stage("trying the model on packed sequences"):
            self.layout: Layout = choose_layout(self, shared_prompt)
        self._reference_model: nn.Module | None = None
        self._reference_adapter: list[Tensor] | None = None
        if keep_reference == "model":
            self._reference_model = copy.deepcopy(model).eval().requires_grad_(False)
        elif keep_reference == "adapter":
            self._reference_adapter = [p.detach().clone() for _, p in self.trainable()]

    @classmethod
    def load(
        cls, config: GRPOConfig, model: nn.Module | None = None, peft_config: Any = None
    ) -> Policy:
        """The policy that ``config`` describes; see ``loading.policy_parts``."""
        return cls(**policy_parts(config, model, peft_config))

    @functools.cached_property
    def has_reference(self) -> bool:
        """Whether inside ``reference`` it is the policy that it began as. Ask before it trains."""
        return self._keeps_reference or (self._new_adapter and does_nothing(self.model))

    @property
    def causal_lm(self) -> Any:
        """The transformers model, adapters inside it if there are any."""
        return unwrapped(self.model)

    @property
    def device(self) -> torch.device:
        return head_layer(self.causal_lm).weight.device

    @property
    def reference_model(self) -> nn.Module | None:
        """The frozen copy of the model that is the reference, where there is one."""
        return self._reference_model

    @property
    def head(self) -> Head:
        """Looked up at every call: wrappers replace modules after we saw them."""
        return find_head(self.causal_lm)

    @property
    def vocabulary_size(self) -> int:
        return vocabulary_size(self.causal_lm)

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        """Names and parameters that the optimizer updates."""
        return [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the model computes in."""
        if isinstance(self.compute_dtype, torch.dtype):
            return self.compute_dtype
        device_type = self.device.type
        if self.compute_dtype == "inherit" and torch.is_autocast_enabled(device_type):
            return torch.get_autocast_dtype(device_type)
        return head_layer(self.causal_lm).weight.dtype

    @property
    def precision(self) -> str:
        """The name of ``dtype``: ``"float32"``, ``"bfloat16"`` or ``"float16"``."""
        return str(self.dtype).removeprefix("torch.")

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The precision that sampling, scoring and update share."""
        if self.compute_dtype == "inherit":
            return contextlib.nullcontext()
        return torch.autocast(
            self.device.type, dtype=self.compute_dtype, enabled=self.compute_dtype is not None
        )

    @property
    def whole(self) -> bool:
        """Whether all tokens are forwarded, and all rows: the router's loss is over all of them."""
        return self.router is not None

    def pack(
        self, pairs: Sequence[tuple[Ids, Ids] | Pair], counted: Sequence[bool] | None = None
    ) -> PackedBatch:
        """Prompts and completions in the policy's layout, on its device; see
        ``PackedBatch.build``."""
        return PackedBatch.build(pairs, self.device, self.layout, whole=self.whole, counted=counted)

    def logprobs(
        self,
        packed: PackedBatch,
        *,
        entropy: bool | Literal["detached"] = False,
        routed: list[RouterSums] | None = None,
    ) -> LogProbs:
        """Log-probs ``[N]`` float32 (and entropies) of the scored tokens of ``packed``.

        Carries gradients unless under ``torch.no_grad``: policy, old and reference log-probs are
        the same route. With gradient checkpointing the backward pass belongs inside ``training``.
        Temperature is applied, top-k and top-p are not. routed: a list that takes
        what the router did with all tokens of ``packed``.
        """
        with self.autocast():
            hidden = self.hidden(packed, routed=routed)
            head = self.head
            packed.check_targets(len(head.weight))
            if self.compute_dtype is None:
                hidden = hidden.to(head.weight.dtype)
            return linear_logprob(
                hidden,
                head.weight,
                packed.targets,
                bias=head.bias,
                temperature=self.temperature,
                logit_scale=head.logit_scale,
                softcap=head.softcap,
                return_entropy=entropy,
                targets_checked=True,
            )

    def hidden(
        self,
        packed: PackedBatch,
        plan: attention.Plan | None = None,
        routed: list[RouterSums] | None = None,
    ) -> Tensor:
        """``[N, H]``: the hidden states that predict the scored tokens. routed: as ``logprobs``."""
        self._check_positions(packed)
        with self._lora():
            return self._hidden(packed, plan, routed)

    def _hidden(
        self,
        packed: PackedBatch,
        plan: attention.Plan | None,
        routed: list[RouterSums] | None,
    ) -> Tensor:
        decoder = self.causal_lm.get_decoder()
        asked = {} if routed is None else {"output_router_logits": True}
        if packed.layout == "rows":
            ids, mask, kept = packed.padded_rows()
            outputs = decoder(input_ids=ids, attention_mask=mask.long(), use_cache=False, **asked)
            # With causal attention no token sees the padding to its right.
            states = outputs.last_hidden_state.flatten(0, 1).index_select(0, kept)
        else:
            kept = None
            outputs = decoder(
                input_ids=packed.input_ids[None],
                position_ids=packed.position_ids[None],
                # Four dimensions: transformers takes it for a finished mask and builds none.
                attention_mask=torch.zeros(1, 1, 1, 1, device=self.device),
                use_cache=False,
                fusedgrpo_plan=plan or attention.Plan(packed.segments, self.device),
                **asked,
            )
            states = outputs.last_hidden_state[0]
        if routed is not None:
            assert self.router is not None and packed.copies is not None
            logits = outputs.router_logits
            if kept is not None:
                logits = [layer.index_select(0, kept) for layer in logits]
            routed.append(self.router.sums(logits, packed.copies))
        return attention.gather_rows(states, packed.predictors)

    def _check_positions(self, packed: PackedBatch) -> None:
        """Say it where rotary embeddings would depend on the longest sequence of the batch."""
        config = self.causal_lm.config.get_text_config()
        rope = getattr(config, "rope_parameters", None) or {}
        kind = rope.get("rope_type")
        if kind not in ("dynamic", "longrope"):
            return
        limit = rope.get("original_max_position_embeddings") or getattr(
            config, "original_max_position_embeddings", config.max_position_embeddings
        )
        longest = max((s.prefix_length + s.length for s in packed.segments), default=0)
        if longest > limit and not self._said_positions:
            self._said_positions = True
            log.warning(
                "rope_type %s: a sequence has %d tokens, more than %d. From there on this model's "
                "numbers depend on the longest sequence beside them in a micro-batch; keep prompt "
                "and completion together below it.",
                kind,
                longest,
                limit,
            )

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """To be entered around a forward pass that trains, and its backward pass: what the model
        would compute otherwise than while it samples is off, unless that was asked for. Where the
        backward pass computes layers anew, for gradient checkpointing, it finds them as they were.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._lora())
            if self.disable_dropout:
                stack.enter_context(switched_off(own_dropout(self.model)))
            if self.trains_as_it_samples:
                stack.enter_context(as_it_samples(self.model))
            yield

    @contextlib.contextmanager
    def _lora(self) -> Iterator[None]:
        if self.lora is None:
            yield
            return
        if not self.lora.has_learned:
            self._learn_shared_inputs(self.lora)
        with self.lora.active():
            yield

    @contextlib.contextmanager
    def passes(self) -> Iterator[None]:
        """``scoring`` around several passes of ``logprobs`` or ``hidden``."""
        with self.scoring(), self._lora():
            yield

    def _learn_shared_inputs(self, lora: FusedLora) -> None:
        assert self.adapters is not None
        ids = torch.arange(1, 9, device=self.device)[None] % self.vocabulary_size
        with self.scoring(), self.autocast(), self.adapters.off(), lora.learn():
            self.causal_lm.get_decoder()(input_ids=ids, use_cache=False)

    @contextlib.contextmanager
    def scoring(self) -> Iterator[None]:
        """Dropout and gradient checkpointing off, no gradients; each module's mode comes back."""
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            for module, training in modes:
                module.training = training

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, ``logprobs`` is the frozen reference's; use it without gradients."""
        if self._reference_adapter is not None:
            with self._swapped(self._reference_adapter):
                yield
        elif self.adapters is not None:
            with self.adapters.off():
                yield
        elif self._reference_model is not None:
            policy, self.model = self.model, self._reference_model
            try:
                yield
            finally:
                self.model = policy
        else:
            raise RuntimeError("This policy was made without keep_reference and has no adapter.")

    def reference_weights(self) -> dict[str, Tensor] | None:
        """The reference's own weights, by name; None where it is the model without its adapter."""
        if self._reference_adapter is not None:
            names = (name for name, _ in self.trainable())
            return dict(zip(names, self._reference_adapter, strict=True))
        if self._reference_model is not None:
            return {name: p.data for name, p in self._reference_model.named_parameters()}
        return None

    def mix_into_reference(self, alpha: float) -> None:
        """``reference = (1 - alpha) reference + alpha policy``, weight by weight: of an adapter,
        those of its two factors. RuntimeError where the reference has no weights of its own."""
        reference = self.reference_weights()
        if reference is None:
            raise RuntimeError("This policy was made without keep_reference.")
        own = dict(self.model.named_parameters())
        for name, weight in reference.items():
            weight.mul_(1 - alpha).add_(own[name].data, alpha=alpha)

    @contextlib.contextmanager
    def _swapped(self, weights: list[Tensor]) -> Iterator[None]:
        parameters = [p for _, p in self.trainable()]
        own = [p.data for p in parameters]
        for parameter, weight in zip(parameters, weights, strict=True):
            parameter.data = weight
        try:
            yield
        finally:
            for parameter, weight in zip(parameters, own, strict=True):
                parameter.data = weight

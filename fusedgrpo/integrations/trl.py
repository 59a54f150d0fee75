"""TRL's GRPO and RLOO trainers on our forward pass: change one line, keep everything else.

    from fusedgrpo.integrations.trl import FusedGRPOTrainer as GRPOTrainer

Log-probs and entropies of policy, old policy and reference come from packed batches in which each
prompt is there once, through a head without logits. Losses, metrics, callbacks, checkpoints, PEFT,
quantization, vLLM and rewards stay TRL's. Tested with TRL 1.16.

Beyond one process (docs/distributed.md): where each has the whole model, it forwards as often as
its own rows ask for. Where weights are sharded, a forward pass is one of all processes together, so
all make the same number of them: the training pass takes all rows, scoring is cut by rows.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from accelerate import DistributedType
from torch import Tensor

from fusedgrpo.errors import ConfigError, ModelError
from fusedgrpo.integrations.packed_forward import PackedForward, install, probe_router
from fusedgrpo.integrations.trl_batches import padded, shuffle_groups, unpadded
from fusedgrpo.integrations.trl_loss import compute_loss, refuse_uncovered
from fusedgrpo.integrations.trl_rollouts import LEAVE_IT_OUT, Rollouts, refuse_options
from fusedgrpo.integrations.trl_version import import_trl
from fusedgrpo.models import missing_backward
from fusedgrpo.models.adapters.kinds import acts_outside
from fusedgrpo.models.four_bit import keep_differentiable
from fusedgrpo.models.micro_batches import micro_batches
from fusedgrpo.models.packed_batch import Layout, PackedBatch
from fusedgrpo.models.packing_probe import SharedPrompt
from fusedgrpo.models.router import RouterSums

log = logging.getLogger("fusedgrpo")


grpo_trainer, rloo_trainer = import_trl()


class FusedLogProbs:
    """A mixin for TRL trainers: put it before the trainer's class among the bases.

    shared_prompt: ``"auto"``, ``"on"`` or ``"off"``, as in ``GRPOConfig``.
    tokens_per_microbatch: packed tokens of one forward without gradients (old and reference
        log-probs); default: as many as ``per_device_train_batch_size`` padded rows have.
    group_rows: keep the completions of a prompt next to each other when the rollout is shuffled, so
        that prompts are shared; groups, and completions within a group, are still shuffled.
        ``False`` shuffles single rows as TRL does.
    fused_loss: (GRPO) the loss is ours too, in one kernel, with TRL's values and metrics.
    fused_rollouts: (GRPO) completions come from our decoder instead of transformers' generate: a
        prompt is read once for its group, nothing is padded, and a completion that ends makes room
        for another. Sampled is what trains, in its precision and without dropout. The noise derives
        from the trainer's seed, the step, the process, and how many rollouts the step had before,
        so a run that is resumed at a generation batch goes on as the uninterrupted one, and the
        global generators are left alone.
    rollout_weights: what fused_rollouts samples from. ``"adapter"``: the base and LoRA beside it;
        ``"merged"``: a copy of the weights with LoRA in it, made anew for each rollout, faster for
        long completions where there is memory for it. None is ``"adapter"``.

    Rows whose gradient is exactly zero (advantage 0, no KL in the loss, no entropy bonus; nothing
    unmasked) are scored without gradients: the same loss, metrics and gradients for a third of
    their cost. Not so where weights are sharded (FSDP, ZeRO-3), nor with a router's load-balancing
    loss, which has a gradient in every row.
    """

    _module: Any = grpo_trainer

    def __init__(
        self,
        *args: Any,
        shared_prompt: SharedPrompt = "auto",
        tokens_per_microbatch: int | None = None,
        group_rows: bool = True,
        fused_loss: bool = False,
        fused_rollouts: bool = False,
        rollout_weights: Literal["adapter", "merged"] | None = None,
        **kwargs: Any,
    ):
        if shared_prompt not in ("auto", "on", "off"):
            raise ConfigError(f"shared_prompt={shared_prompt!r}: expected 'auto', 'on' or 'off'.")
        if tokens_per_microbatch is not None and tokens_per_microbatch < 1:
            raise ConfigError(
                f"tokens_per_microbatch={tokens_per_microbatch}: expected at least 1."
            )
        if rollout_weights not in (None, "adapter", "merged"):
            raise ConfigError(
                f"rollout_weights={rollout_weights!r}: expected 'adapter' or 'merged'."
            )
        if rollout_weights is not None and not fused_rollouts:
            raise ConfigError(
                f"rollout_weights={rollout_weights!r} is what fused_rollouts=True samples from: "
                "give both or neither."
            )
        self.tokens_per_microbatch = tokens_per_microbatch
        if fused_loss and self._module is not grpo_trainer:
            raise ConfigError("fused_loss=True is for GRPO: RLOO has a loss of its own.")
        if fused_rollouts:
            if self._module is not grpo_trainer:
                raise ConfigError(f"fused_rollouts=True is for GRPO: {LEAVE_IT_OUT}")
            names = inspect.signature(grpo_trainer.GRPOTrainer).parameters
            refuse_options(dict(zip(names, args, strict=False)) | kwargs)
        self.group_rows = group_rows
        self.fused_loss = fused_loss
        self._no_gradient: Tensor | None = None
        self._said: set[str] = set()
        self._rollouts: Rollouts | None = None
        super().__init__(*args, **kwargs)
        me: Any = self
        for model in (me.model, getattr(me, "ref_model", None)):
            if model is not None:
                keep_differentiable(model)  # before its first forward pass
        if self._sharded and tokens_per_microbatch is not None:
            raise ConfigError(
                f"tokens_per_microbatch={tokens_per_microbatch} with sharded weights (FSDP, "
                "ZeRO-3): completions differ between processes, and so would their numbers of "
                "forward passes. Leave it out; per_device_train_batch_size sets the rows of one."
            )
        if fused_loss:
            refuse_uncovered(me)
        if fused_rollouts and self._sharded:
            raise ConfigError(
                f"fused_rollouts=True with sharded weights (FSDP, ZeRO-3): {LEAVE_IT_OUT}"
            )
        self._obstacle = self._reason_for_trls_forward()
        if self._obstacle is not None and fused_rollouts:
            raise ModelError(f"fused_rollouts=True: {self._obstacle}; {LEAVE_IT_OUT}")
        if self._obstacle is not None:
            # For policy, old policy and reference alike: their log-probs are compared.
            self._say(f"TRL's own forward pass is used: {self._obstacle}.")
            return
        for model in (me.model, getattr(me, "ref_model", None)):
            if model is not None:
                install(
                    _causal_lm(me.accelerator.unwrap_model(model)),
                    temperature=me.temperature,
                    shared_prompt=shared_prompt,
                    head_in_float32=bool(getattr(me.args, "cast_lm_head_to_fp32", False)),
                    router_coef=self._router_coef,
                )
        if fused_rollouts:
            forward = self._packed_forward(me.model)
            assert forward is not None
            causal_lm = _causal_lm(me.accelerator.unwrap_model(me.model))
            self._rollouts = Rollouts(self, causal_lm, forward, rollout_weights or "adapter")

    @property
    def _router_coef(self) -> float:
        me: Any = self
        return float(me.router_aux_loss_coef) if me.aux_loss_enabled else 0.0

    def _reason_for_trls_forward(self) -> str | None:
        """Parts of this model or its adapters that a packed forward would not see."""
        me: Any = self
        model = me.accelerator.unwrap_model(me.model)
        causal_lm = _causal_lm(model)
        if type(causal_lm).__name__.endswith("ForConditionalGeneration"):
            return "the model takes more than text"
        for adapter in getattr(model, "peft_config", {}).values():
            if (outside := acts_outside(adapter)) is not None:
                return outside
        if self._router_coef and not self._sharded:
            try:
                probe_router(causal_lm, self._router_coef)
            except ModelError as error:
                return str(error).rstrip(".")
        return None

    # --- log-probs -------------------------------------------------------------------------------

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **multimodal: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """``(logps [B, T], entropies [B, T] or None, load-balancing loss or None)``, the first two
        0 where the mask is 0, as TRL's."""
        forward = self._packed_forward(model)
        obstacle = self._obstacle
        if any(value is not None for value in multimodal.values()):
            obstacle = "the batch holds more than text"
        if obstacle is not None or forward is None:
            self._say(f"TRL's own forward pass is used: {obstacle}.")
            return super()._get_per_token_logps_and_entropies(  # type: ignore[misc]
                model, input_ids, attention_mask, logits_to_keep, batch_size=batch_size,
                compute_entropy=compute_entropy, compute_aux_loss=compute_aux_loss, **multimodal,
            )  # fmt: skip

        pairs = unpadded(input_ids, attention_mask, logits_to_keep)
        kept = attention_mask[:, -logits_to_keep:].bool()
        training = torch.is_grad_enabled()
        entropy: bool | Literal["detached"] = False
        if compute_entropy:
            bonus = training and getattr(self, "_entropy_bonus_enabled", False)
            entropy = True if bonus else "detached"
        layout = self._layout(model, forward)

        parts: list[tuple[list[int], Tensor, Tensor | None]] = []
        routed: list[Tensor] = []

        def score(rows: list[int]) -> None:
            logp, entropies, sums = self._score(model, pairs, rows, entropy)
            parts.append((rows, logp, entropies))
            if sums is not None:
                routed.append(sums)

        with_gradient, without = self._split_rows(len(pairs), training)
        if with_gradient:  # in one piece: its activations stay until the backward in any case
            score(with_gradient)
        rows_at_once = batch_size or len(pairs)
        if self._sharded:
            cut = [without[k : k + rows_at_once] for k in range(0, len(without), rows_at_once)]
        else:
            budget = self.tokens_per_microbatch or rows_at_once * input_ids.shape[1]
            members = micro_batches(
                [pairs[i] for i in without], budget, layout, whole=bool(self._router_coef)
            )
            cut = [[without[k] for k in batch] for batch in members]
        with torch.no_grad() if training else contextlib.nullcontext():
            for rows in cut:
                score(rows)
        logps = padded([(rows, logp) for rows, logp, _ in parts], kept, pairs)
        entropies = None
        if compute_entropy:
            entropies = padded([(rows, e) for rows, _, e in parts if e is not None], kept, pairs)
        aux_loss = None
        if compute_aux_loss:
            router = forward.policy.router
            assert router is not None
            total = torch.stack(routed).sum(0)
            aux_loss = router.loss(RouterSums(total.imag.detach().double(), total.real))
        return logps, entropies, aux_loss

    def _score(
        self, model: Any, pairs: Sequence[Any], rows: list[int], entropy: bool | str
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Log-probs, entropies if asked for, and a router's sums."""
        me: Any = self
        forward = self._packed_forward(model)
        assert forward is not None
        packed = PackedBatch.build(
            [pairs[i] for i in rows],
            me.accelerator.device,
            forward.layout,
            whole=bool(self._router_coef),
        )
        answer = self._forward(model, (packed, entropy))
        scored, sums = answer if self._router_coef else (answer, None)
        return scored.real, scored.imag if entropy else None, sums

    @functools.cached_property
    def _sharded(self) -> bool:
        """Whether weights are spread over processes (FSDP, ZeRO-3)."""
        state = self.accelerator.state  # type: ignore[attr-defined]
        if state.distributed_type == DistributedType.DEEPSPEED:
            return bool(state.deepspeed_plugin.zero_stage == 3)
        return bool(state.distributed_type == DistributedType.FSDP)

    def _forward(self, model: Any, request: Any) -> Any:
        """The answer of the packed forward of ``model``."""
        me: Any = self
        if not (torch.is_grad_enabled() or self._sharded):
            # Not through DDP, whose every forward sends buffers to all processes.
            model = me.accelerator.unwrap_model(model)
        with me.accelerator.autocast():
            return model(fusedgrpo_packed=request)

    def _layout(self, model: Any, forward: PackedForward) -> Layout:
        if not forward.asked:
            with torch.no_grad():
                self._forward(model, "layout")
        return forward.layout

    def _packed_forward(self, model: Any) -> PackedForward | None:
        me: Any = self
        return getattr(_causal_lm(me.accelerator.unwrap_model(model)), "fusedgrpo_forward", None)

    def _split_rows(self, count: int, training: bool) -> tuple[list[int], list[int]]:
        """Rows to score with and without gradients."""
        if not training:
            return [], list(range(count))
        if self._no_gradient is None or self._sharded:
            return list(range(count)), []
        flags = self._no_gradient.tolist()
        live = [i for i in range(count) if not flags[i]]
        # One row at least: the loss has to hang on the parameters, and DDP waits for all of them.
        live = live or [0]
        return live, [i for i in range(count) if i not in set(live)]

    # --- rollouts --------------------------------------------------------------------------------

    def _generate_single_turn(
        self, prompt_ids: Any, images: Any, multimodal_fields: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if self._rollouts is None:
            return super()._generate_single_turn(  # type: ignore[misc]
                prompt_ids, images, multimodal_fields, *args, **kwargs
            )
        if images is not None or multimodal_fields:
            raise ConfigError(
                f"fused_rollouts=True: the prompts hold more than text "
                f"({', '.join(multimodal_fields) or 'images'}): {LEAVE_IT_OUT}"
            )
        me: Any = self
        mode = "train" if me.model.training else "eval"
        with grpo_trainer.profiling_context(self, "transformers.generate"):
            completions = self._rollouts.completions(prompt_ids, mode)
        return completions, None  # as where TRL generates: log-probs are the policy's own

    # --- steps, their loss and the order of rows --------------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> Any:
        with missing_backward.refused():
            return super().train(*args, **kwargs)  # type: ignore[misc]

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        with missing_backward.refused():
            return super().training_step(*args, **kwargs)  # type: ignore[misc]

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        self._no_gradient = self._rows_without_gradient(inputs)
        try:
            if self.fused_loss:
                return compute_loss(self, model, inputs)
            return super()._compute_loss(model, inputs)  # type: ignore[misc]
        finally:
            self._no_gradient = None

    def _rows_without_gradient(self, inputs: dict[str, Any]) -> Tensor:
        """``[B]`` bool: rows whose gradient is exactly 0 under TRL's loss."""
        mask = inputs["completion_mask"]
        if "tool_mask" in inputs:
            mask = mask * inputs["tool_mask"]
        nothing = mask.sum(1) == 0
        if self._router_coef:  # the router's loss has a gradient in all of them
            return torch.zeros_like(nothing)
        in_loss_kl = getattr(self, "beta", 0.0) != 0.0 and self._module is grpo_trainer
        if in_loss_kl or getattr(self, "_entropy_bonus_enabled", False):
            return nothing
        advantages = inputs["advantages"]
        flat = advantages == 0 if advantages.dim() == 1 else (advantages == 0).all(1)
        return nothing | flat

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        if not self.group_rows:
            return super()._prepare_inputs(generation_batch)  # type: ignore[misc]
        with _replaced(self._module, "shuffle_sequence_dict", shuffle_groups):
            return super()._prepare_inputs(generation_batch)  # type: ignore[misc]

    def _say(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            log.warning(message)


class FusedGRPOTrainer(FusedLogProbs, grpo_trainer.GRPOTrainer):  # type: ignore
    """``trl.GRPOTrainer``, with the arguments of ``FusedLogProbs`` besides its own."""


class FusedRLOOTrainer(FusedLogProbs, rloo_trainer.RLOOTrainer):  # type: ignore
    """``trl.RLOOTrainer``, with the arguments of ``FusedLogProbs`` besides its own."""

    _module = rloo_trainer


@contextlib.contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    """TRL looks the function up in its module when it calls it, and offers no other way in."""
    original = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, original)


def _causal_lm(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model

"""Broken variants of kernels and of LoRA's layers, with the tests that have to notice them.

A mutant is one line, or two, of one file, changed the way people get it wrong.
``python tests/mutants/trial.py`` prints which test kills which.
"""

from __future__ import annotations

from decode_mutants import DECODE_MUTANTS
from lora_mutants import LORA_MUTANTS
from mutant import KERNEL_IDS, ROOT, Mutant
from norm_mutants import NORM_MUTANTS

__all__ = ["BACKENDS", "MUTANTS", "ROOT", "Mutant"]

BACKENDS = tuple(KERNEL_IDS)

SCORING = "logprob/test_linear_logprob.py::"
FUSED = "fused_loss/test_linear_policy_loss.py::"
LOSS = "loss/test_policy_loss.py::"
ADVANTAGES = "advantage/test_group_advantages.py::"
SAMPLING = "sample/test_linear_sample.py::"
NOISE = "sample/test_philox.py::"


MUTANTS = (
    # The online softmax over tiles of the vocabulary, and the gradient of its logits.
    Mutant(
        "the temperature is missing in d logp / d hidden",
        "logprob/tiles.py",
        "entropy, rest * head.slope)",
        "entropy, rest)",
        (SCORING + "test_values_and_all_gradients_equal_the_reference[False-options1]",),
    ),
    Mutant(
        "the temperature is applied before the softcap",
        "logprob/tiles.py",
        "z.mul_(head.logit_scale / head.softcap).tanh_().mul_(head.softcap / head.temperature)",
        "z.mul_(head.slope / head.softcap).tanh_().mul_(head.softcap)",
        (SCORING + "test_values_and_all_gradients_equal_the_reference[False-options4]",),
    ),
    Mutant(
        "the maximum starts at 0",
        "logprob/tiles.py",
        "zeros[0] = -torch.inf",
        "zeros[0] = 0.0",
        (SCORING + "test_logits_far_from_zero_cost_nothing[-10000.0]",),
    ),
    Mutant(
        "the target stays in the softmax over the others",
        "logprob/tiles.py",
        "z.scatter_(1, column, torch.where(here, -torch.inf, z_column))",
        "z.scatter_(1, column, z_column)",
        (SCORING + "test_values_and_all_gradients_equal_the_reference[False-options0]",),
    ),
    Mutant(
        "the entropy's first moment does not follow the maximum",
        "logprob/tiles.py",
        "rescale * (softmax.first + softmax.shift * softmax.total)",
        "rescale * softmax.first",
        (SCORING + "test_values_and_all_gradients_equal_the_reference[False-options0]",),
    ),
    Mutant(
        "the target's column is off by one",
        "logprob/softmax_triton.py",
        "    column = tl.load(target_ptr + row) - lo\n    here = ",
        "    column = tl.load(target_ptr + row) - lo + 1\n    here = ",
        (SCORING + "test_values_and_all_gradients_equal_the_reference[False-options0]",),
    ),
    Mutant(
        "columns beyond the vocabulary count",
        "logprob/softmax_triton.py",
        "e = tl.where(inside & (cols != column), tl.exp(z - base), 0.0)\n        total",
        "e = tl.where(cols != column, tl.exp(z - base), 0.0)\n        total",
        (SCORING + "test_a_vocabulary_that_fills_no_tile_has_no_phantom_columns[15]",),
    ),
    Mutant(
        "the sum of weights does not follow the maximum",
        "logprob/softmax_triton.py",
        "tl.store(acc_ptr + row * H + cols, acc * factor, mask=inside)",
        "tl.store(acc_ptr + row * H + cols, acc, mask=inside)",
        (SCORING + "test_values_and_all_gradients_equal_the_reference[False-options0]",),
    ),
    Mutant(
        "the softcap has slope 1",
        "logprob/logit_triton.py",
        "z, slope = capped * (SOFTCAP / TEMPERATURE), 1.0 - capped * capped",
        "z, slope = capped * (SOFTCAP / TEMPERATURE), 1.0",
        (SCORING + "test_values_and_all_gradients_equal_the_reference[False-options3]",),
    ),
    Mutant(
        "1 - p of a sure token cancels",
        "logprob/finish_triton.py",
        "rest = sigmoid(x)\n    p_target = sigmoid(-x)",
        "p_target = sigmoid(-x)\n    rest = 1.0 - p_target",
        (SCORING + "test_a_sure_token_keeps_its_gradient",),
    ),
    Mutant(
        "stored probabilities are taken for those of the last maximum",
        "logprob/vocab_pass.py",
        "stored.high[index] = softmax.high",
        "stored.high[:] = softmax.high",
        (FUSED + "test_it_is_the_policy_loss_of_the_log_probs[token-dapo]",),
    ),
    # Log-probs and their backward.
    Mutant(
        "16-bit logit gradients of a trained head are not in units of the largest",
        "logprob/backward.py",
        "unit = _greatest(grad_logp, grad_entropy)",
        "unit = torch.ones_like(_greatest(grad_logp, grad_entropy))",
        (SCORING + "test_a_low_precision_head_sums_what_its_logits_could_not_hold",),
    ),
    Mutant(
        "the entropy has no gradient",
        "logprob/op.py",
        "scale_rows(next(in_units), dlogp, next(in_units), dentropy)",
        "scale_rows(next(in_units), dlogp, None, dentropy)",
        (SCORING + "test_each_gradient_alone_from_each_output_alone[entropy-hidden]",),
    ),
    Mutant(
        "masked tokens train the head",
        "logprob/backward.py",
        "keep = None if mask is None else mask.nonzero().flatten()",
        "keep = None",
        (SCORING + "test_masked_positions_add_nothing_to_the_gradients_of_the_head",),
    ),
    # Hidden states to loss.
    Mutant(
        "what rounding takes from the target's entry is lost",
        "fused_loss/grad_from_probs.py",
        "if rounded is not at_target:",
        "if False:",
        (FUSED + "test_low_precision_rounds_the_exact_gradient_once[dtype0]",),
    ),
    Mutant(
        "1 - p of a sure token cancels in the loss",
        "fused_loss/grad_from_probs.py",
        "factor * -torch.expm1(statistics.logp)",
        "factor * (1 - statistics.logp.exp())",
        (FUSED + "test_a_sure_token_keeps_its_gradient",),
    ),
    Mutant(
        "small coefficients underflow in float16",
        "fused_loss/grad_from_probs.py",
        "kept, unit = rows_with_gradient(coefficient)",
        "kept, unit = rows_with_gradient(coefficient)[0], 1.0",
        (FUSED + "test_low_precision_rounds_the_exact_gradient_once[dtype1]",),
    ),
    Mutant(
        "chunks are cut inside a completion at level sequence",
        "fused_loss/chunks.py",
        "if whole and hi < N:",
        "if False:",
        (FUSED + "test_it_is_the_policy_loss_of_the_log_probs[sequence-dapo]",),
    ),
    Mutant(
        "the mean of a completion is over its tokens in the chunk",
        "fused_loss/op.py",
        "counts=counts[own],",
        "counts=None,",
        (FUSED + "test_it_is_the_policy_loss_of_the_log_probs[token-grpo]",),
    ),
    Mutant(
        "tokens without a finite sampler weight count in the mean",
        "fused_loss/chunks.py",
        "mask = finite if mask is None else mask & finite",
        "mask = torch.ones_like(finite) if mask is None else mask",
        (FUSED + "test_a_token_without_a_finite_sampler_weight_is_as_good_as_masked",),
    ),
    # The policy loss.
    Mutant(
        "the KL's gradient has the wrong sign",
        "loss/terms.py",
        "torch.where(gap.abs() > MAX_LOG_RATIO, 0.0, -d.expm1())",
        "torch.where(gap.abs() > MAX_LOG_RATIO, 0.0, d.expm1())",
        (LOSS + "test_loss_and_gradient_equal_the_reference[token-dapo]",),
    ),
    Mutant(
        "the sampler's weight is applied to the KL too",
        "loss/terms.py",
        "value = value + options.beta * kl\n",
        "value = value + options.beta * kl * (1 if sampler_ratio is None else sampler_ratio)\n",
        (LOSS + "test_loss_and_gradient_equal_the_reference[token-dapo]",),
    ),
    Mutant(
        "a clamped ratio passes its gradient",
        "loss/terms.py",
        "through_ratio = torch.where(clamped, 0.0, by_ratio * ratio)",
        "through_ratio = by_ratio * ratio",
        (LOSS + "test_the_gradient_ends_just_outside_the_clamp",),
    ),
    Mutant(
        "the gradient of a completion's ratio is not divided by its tokens",
        "loss/terms.py",
        "through_ratio = ragged.spread(ragged.mean(through_ratio))",
        "through_ratio = ragged.spread(ragged.sum(through_ratio))",
        (LOSS + "test_loss_and_gradient_equal_the_reference[sequence-dapo]",),
    ),
    Mutant(
        "delta is for negative advantages only",
        "loss/surrogates/clipped.py",
        "capped = ratio if options.delta is None else ratio.clamp(max=options.delta)",
        "capped = ratio if options.delta is None else ratio.clamp(max=options.delta)\n"
        "    capped = torch.where(advantage > 0, ratio, capped)",
        (LOSS + "test_a_delta_below_the_clip_holds_for_both_signs",),
    ),
    Mutant(
        "completions without tokens have the least clip share",
        "loss/terms.py",
        "ragged.mean(low).masked_fill(empty, torch.inf)",
        "ragged.mean(low)",
        (
            LOSS + "test_the_least_and_greatest_clip_share_leave_out_completions_without_tokens"
            "[-1-names1]",
        ),
    ),
    Mutant(
        "the clip takes the gradient on the wrong side",
        "loss/surrogates/clipped_triton.py",
        "a_counts = tl.where(a == b, 0.5, tl.where(a < b, 1.0, 0.0))",
        "a_counts = tl.where(a == b, 0.5, tl.where(a > b, 1.0, 0.0))",
        (LOSS + "test_clip_sides",),
    ),
    Mutant(
        "the KL is not corrected for the bias of its samples",
        "loss/terms_triton.py",
        "            kl = kl * ratio\n            kl_by_logp = kl_by_logp * ratio\n",
        "",
        (LOSS + "test_loss_and_gradient_equal_the_reference[token-dapo]",),
    ),
    Mutant(
        "a clamp hides NaN",
        "triton_math.py",
        "return tl.where(x > most, most, tl.where(x < least, least, x))",
        "return tl.minimum(tl.maximum(x, least), most)",
        (LOSS + "test_a_nan_in_an_unmasked_token_shows_in_loss_and_gradient",),
    ),
    Mutant(
        "vespo takes the exponent of the other sign",
        "loss/surrogates/vespo_triton.py",
        "k = tl.where(advantage >= 0.0, OPTIONS.k_pos, OPTIONS.k_neg)",
        "k = tl.where(advantage < 0.0, OPTIONS.k_pos, OPTIONS.k_neg)",
        (LOSS + "test_loss_and_gradient_equal_the_reference[token-vespo]",),
    ),
    Mutant(
        "num_sequences is ignored",
        "loss/denominator.py",
        "count = completions if num_sequences is None else num_sequences",
        "count = completions",
        (LOSS + "test_any_split_into_micro_batches_adds_up[token-grpo]",),
    ),
    Mutant(
        "no tokens divide by 0",
        "loss/denominator.py",
        "count = count.detach().clamp(min=1)",
        "count = count.detach()",
        (LOSS + "test_everything_masked_is_exactly_zero_and_connected[dapo]",),
    ),
    # Draws.
    Mutant(
        "a round of the generator is missing",
        "sample/philox.py",
        "ROUNDS = 10",
        "ROUNDS = 9",
        (NOISE + "test_known_answers[pi]",),
    ),
    Mutant(
        "the counter is off by one",
        "sample/philox.py",
        "philox4x32((quads[None], ",
        "philox4x32((quads[None] + 1, ",
        (NOISE + "test_the_bits_of_a_token_are_those_of_seed_position_and_token[0]",),
    ),
    Mutant(
        "a random number rounds to 1",
        "sample/philox.py",
        "small = bits < 2**31",
        "small = bits >= 0",
        (NOISE + "test_no_number_is_infinite_and_all_are_accurate",),
    ),
    Mutant(
        "the temperature is missing in a draw",
        "sample/best_cpu.py",
        "to_logits(z, bias, head)",
        "to_logits(z, bias, HeadOptions(1.0, head.logit_scale, head.softcap))",
        (SAMPLING + "test_tokens_and_log_probs_equal_the_reference[False-False-options1]",),
    ),
    Mutant(
        "a token is drawn from the first tile",
        "sample/best_cpu.py",
        "won = high > best.score.numpy()",
        "won = (high > best.score.numpy()) & (lo == 0)",
        (SAMPLING + "test_tokens_and_log_probs_equal_the_reference[True-False-options0]",),
    ),
    Mutant(
        "of equal scores in two tiles the later is drawn",
        "sample/best_cpu.py",
        "won = high > best.score.numpy()",
        "won = high >= best.score.numpy()",
        (SAMPLING + "test_of_equal_logits_greedy_takes_the_lowest_id",),
    ),
    Mutant(
        "the sum of the others is that of another best token",
        "sample/best_cpu.py",
        "(best.others.total, before[1])",
        "(best.others.total, best.others.total.numpy())",
        (SAMPLING + "test_tokens_and_log_probs_equal_the_reference[False-False-options0]",),
    ),
    Mutant(
        "a sum is shared with a row whose greatest logit is another",
        "sample/best_cpu.py",
        "rows = np.flatnonzero(won | ~shared)",
        "rows = np.flatnonzero(won)",
        (SAMPLING + "test_the_log_prob_is_that_of_linear_logprob_bit_for_bit[options0]",),
    ),
    Mutant(
        "tokens that could still win are not scored",
        "sample/best_cpu.py",
        "exp_().mul_(2.0**31)",
        "exp_().mul_(2.0**30)",
        (SAMPLING + "test_tokens_and_log_probs_equal_the_reference[False-False-options0]",),
    ),
    Mutant(
        "an infinite logit passes for a certain token",
        "sample/op.py",
        "statistics.logp.masked_fill(endless, torch.nan)",
        "statistics.logp",
        (SAMPLING + "test_one_logit_that_is_not_finite_is_enough[20-inf]",),
    ),
    Mutant(
        "the noise forgets half of the seed",
        "sample/philox_triton.py",
        "(seed >> 32).to(tl.uint32)",
        "seed.to(tl.uint32)",
        (NOISE + "test_the_bits_of_a_token_are_those_of_seed_position_and_token[0]",),
    ),
    Mutant(
        "four tokens take each other's noise",
        "sample/philox_triton.py",
        "tl.interleave(tl.interleave(a, c), tl.interleave(b, d))",
        "tl.interleave(tl.interleave(a, b), tl.interleave(c, d))",
        (NOISE + "test_the_bits_of_a_token_are_those_of_seed_position_and_token[0]",),
    ),
    Mutant(
        "a draw ignores the temperature",
        "sample/best_triton.py",
        "inside, LOGIT_SCALE, SOFTCAP, TEMPERATURE)",
        "inside, LOGIT_SCALE, SOFTCAP, 1.0)",
        (SAMPLING + "test_tokens_and_log_probs_equal_the_reference[False-False-options1]",),
    ),
    Mutant(
        "the counter starts anew in each tile",
        "sample/best_triton.py",
        "quads = (lo + start) // 4",
        "quads = start // 4",
        (SAMPLING + "test_tokens_and_log_probs_equal_the_reference[False-False-options0]",),
    ),
    Mutant(
        "a tile takes the noise of another four tokens",
        "sample/best_triton.py",
        "early = lo % 4",
        "early = lo % 1",
        (SAMPLING + "test_a_draw_does_not_depend_on_the_tiling[7]",),
    ),
    Mutant(
        "of equal scores the highest id is drawn",
        "sample/best_triton.py",
        "tl.min(tl.where(best == score, best_column, width), 0)",
        "tl.max(tl.where(best == score, best_column, 0), 0)",
        (SAMPLING + "test_of_equal_logits_greedy_takes_the_lowest_id",),
    ),
    Mutant(
        "the best of the last tile is compared",
        "sample/best_triton.py",
        "tl.where(won, score, before)",
        "score",
        (SAMPLING + "test_tokens_and_log_probs_equal_the_reference[True-False-options0]",),
    ),
    Mutant(
        "the others keep the maximum of another best token",
        "sample/best_triton.py",
        "tl.store(others_high_ptr + row, tl.load(every_high_ptr + row), mask=won)",
        "tl.store(others_high_ptr + row, tl.load(others_high_ptr + row), mask=won)",
        (SAMPLING + "test_tokens_and_log_probs_equal_the_reference[False-False-options0]",),
    ),
    # Advantages.
    Mutant(
        "eps is inside the root",
        "advantage/op.py",
        "advantages_B1 = advantages_B1 / (_std(total_B1, scope_B) + eps)",
        "advantages_B1 = advantages_B1 / (_std(total_B1, scope_B).square() + eps).sqrt()",
        (ADVANTAGES + "test_eps_is_added_to_the_deviation",),
    ),
    Mutant(
        "the deviation of the batch divides where the group's should",
        "advantage/op.py",
        'scope_B = group_B if scale_rewards == "group" else everyone_B',
        "scope_B = everyone_B",
        (ADVANTAGES + "test_the_formula_by_hand",),
    ),
    Mutant(
        "the standard deviation is biased",
        "advantage/advantages_triton.py",
        "tl.div_rn(tl.sum(squares, 0), count - 1.0)",
        "tl.div_rn(tl.sum(squares, 0), count)",
        (ADVANTAGES + "test_the_formula_by_hand",),
    ),
    Mutant(
        "missing rewards count in the mean",
        "advantage/advantages_triton.py",
        "counts += tl.where(x == x, 1.0, 0.0)",
        "counts += tl.where(member, 1.0, 0.0)",
        (ADVANTAGES + "test_unscorable_rows_get_zero_and_do_not_move_the_others[group]",),
    ),
    *DECODE_MUTANTS,
    *LORA_MUTANTS,
    *NORM_MUTANTS,
)

"""Broken variants of ``decode_attention``."""

from __future__ import annotations

from mutant import Mutant

TESTS = "decode/test_decode_attention.py::"
PLAIN = TESTS + "test_it_equals_the_reference[True-plain]"
INTO_PROMPT = TESTS + "test_it_equals_the_reference[True-window=7]"
WITHIN_OWN = TESTS + "test_it_equals_the_reference[True-window=2]"
MANY = TESTS + "test_many_keys_and_many_rows[None]"
MANY_WINDOW = TESTS + "test_many_keys_and_many_rows[170]"
SCALING = TESTS + "test_it_equals_the_reference[True-scaling=0.4]"
SOFTCAP = TESTS + "test_it_equals_the_reference[True-softcap=1.5]"
HEADS = TESTS + "test_heads_that_share_keys[plain-6-2]"

TORCH = "decode/attention_torch.py"
LAYOUT = "decode/layout.py"
SPLITS = "decode/attention_triton.py"
MERGE = "decode/merge_triton.py"

DECODE_MUTANTS = (
    Mutant(
        "the window over the prompt is one key short",
        LAYOUT,
        "max(P + n - window, 0)",
        "max(P + n - window + 1, 0)",
        (INTO_PROMPT,),
    ),
    Mutant(
        "the window over own keys is one key long",
        LAYOUT,
        "max(n - window, 0)",
        "max(n - window - 1, 0)",
        (WITHIN_OWN,),
    ),
    Mutant(
        "keys after a row's last are seen",
        LAYOUT,
        "hidden = (at >= seen[:, None])",
        "hidden = (at > seen[:, None])",
        (PLAIN,),
    ),
    Mutant(
        "values that have no weight are multiplied with it",
        LAYOUT,
        "clamp(max=seen[:, None] - 1)",
        "clamp(max=(seen[:, None] - 1) // page * page + page - 1)",
        (PLAIN,),
    ),
    Mutant(
        "prompt and completion are joined without their maxima",
        TORCH,
        "total = a.total * a_scale + b.total * b_scale",
        "total = a.total + b.total",
        (PLAIN,),
    ),
    Mutant(
        "the scaling is missing",
        TORCH,
        "query.to(_exact(query)) * scaling",
        "query.to(_exact(query)) * 1.0",
        (SCALING,),
    ),
    Mutant(
        "values of the wrong head",
        TORCH,
        "torch.bmm(scores, value).view(n, h_kv",
        "torch.bmm(scores, value.roll(1, 0)).view(n, h_kv",
        (HEADS,),
    ),
    Mutant(
        "rows come back in the order of their lengths",
        LAYOUT,
        "torch.tensor(order).argsort()",
        "torch.tensor(order).sort().values",
        (TESTS + "test_rows_of_very_different_lengths[plain]",),
    ),
    # In Triton.
    Mutant(
        "the window over a prompt's split is one key short",
        SPLITS,
        "lows = tl.maximum(length + own - WINDOW, 0)",
        "lows = tl.maximum(length + own - WINDOW + 1, 0)",
        (INTO_PROMPT,),
    ),
    Mutant(
        "the window over a split of own keys is one key long",
        SPLITS,
        "low = tl.maximum(length - WINDOW, 0)",
        "low = tl.maximum(length - WINDOW - 1, 0)",
        (WITHIN_OWN,),
    ),
    Mutant(
        "the rest of a last block counts",
        SPLITS,
        "seen = inside[None, :] & (position[None, :] >= lows[:, None])",
        "seen = position[None, :] >= lows[:, None]",
        (PLAIN,),
    ),
    Mutant(
        "the rest of a last page is read",
        SPLITS,
        "inside = position < end",
        "inside = position < (end + PAGE - 1) // PAGE * PAGE",
        (PLAIN,),
    ),
    Mutant(
        "the product is not rescaled when the maximum moves",
        SPLITS,
        "product = product * rescale[:, None]",
        "product = product * 1.0",
        (MANY,),
    ),
    Mutant(
        "scores are not scaled",
        SPLITS,
        'input_precision="ieee") * SCALING',
        'input_precision="ieee")',
        (SCALING,),
    ),
    Mutant(
        "the softcap is not multiplied back",
        SPLITS,
        "tanh(score / SOFTCAP) * SOFTCAP",
        "tanh(score / SOFTCAP)",
        (SOFTCAP,),
    ),
    Mutant(
        "queries of the wrong heads",
        SPLITS,
        "head = kv * REP + index % REP",
        "head = index % REP * H_KV + kv",
        (HEADS,),
    ),
    Mutant(
        "parts are merged without their maxima",
        MERGE,
        "tl.load(total_ptr + at) * scale",
        "tl.load(total_ptr + at)",
        (PLAIN,),
    ),
    Mutant(
        "the last part of a prompt is left out",
        MERGE,
        "tl.cdiv(prompt, SPLIT)",
        "prompt // SPLIT",
        (PLAIN,),
    ),
    Mutant(
        "the prompt of the group before",
        MERGE,
        "(end <= row)",
        "(end < row)",
        (MANY,),
    ),
)

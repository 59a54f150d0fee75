"""``linear_sample``: the next token from hidden states, without logits; and from given logits."""

"""``linear_sample``: the next token from hidden states, without logits."""

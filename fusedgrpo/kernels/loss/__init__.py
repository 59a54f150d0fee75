"""``policy_loss``: the clipped policy-gradient loss on ragged tokens."""

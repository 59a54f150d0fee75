"""``linear_policy_loss`` and ``GRPOLoss``: hidden states to loss in one operation."""

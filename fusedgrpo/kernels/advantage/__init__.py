"""``group_advantages``: rewards normalised within their group."""

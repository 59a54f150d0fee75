"""``decode_attention``: one token of each live sequence over paged keys, prompts read once."""

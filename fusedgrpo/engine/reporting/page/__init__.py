"""Pages for a browser: each is one file that asks the network for nothing."""

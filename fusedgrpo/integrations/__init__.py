"""Other people's trainers on our forward pass and loss; each module is imported on demand only."""

"""Where a fact lives: numbers, no change to the model."""

"""The embedded default: our own facts, the small models grown from them, and the recipe."""

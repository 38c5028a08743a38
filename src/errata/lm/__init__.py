"""Everything about models and tokens, and nowhere else: anatomy, loading, hooks, texts."""

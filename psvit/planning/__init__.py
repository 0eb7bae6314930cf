"""Which layers of a trained model shall share and where its tokens are pooled, for a budget."""

"""PSViT: vision transformers with pooled tokens and shared attention maps."""

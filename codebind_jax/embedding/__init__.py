"""Mode `embed`: a manifest of any size to shards of embeddings and codes."""

"""Training methods, one module for each paper, over shared towers, codebooks and losses."""

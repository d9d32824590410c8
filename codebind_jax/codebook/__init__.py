"""Codebooks as explicit state: search, quantisation, EMA update with revival, k-means start, usage."""

from codebind_jax.codebook.clustering import kmeans as kmeans
from codebind_jax.codebook.nearest import nearest_code as nearest_code
from codebind_jax.codebook.state import CodebookState as CodebookState
from codebind_jax.codebook.state import Quantized as Quantized
from codebind_jax.codebook.state import advance as advance
from codebind_jax.codebook.state import check_codes as check_codes
from codebind_jax.codebook.state import collapsed as collapsed
from codebind_jax.codebook.state import init_codebook as init_codebook
from codebind_jax.codebook.state import quantize as quantize
from codebind_jax.codebook.state import quantize_segments as quantize_segments
from codebind_jax.codebook.state import update as update
from codebind_jax.codebook.state import usage_stats as usage_stats

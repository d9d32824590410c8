"""Losses: pure functions of arrays, float32 inside whatever the compute type."""

from codebind_jax.losses.balance import BalanceState as BalanceState
from codebind_jax.losses.balance import balance_init as balance_init
from codebind_jax.losses.balance import balance_update as balance_update
from codebind_jax.losses.code_contrast import code_contrast as code_contrast
from codebind_jax.losses.code_contrast import code_contrast_segments as code_contrast_segments
from codebind_jax.losses.codes import code_matching as code_matching
from codebind_jax.losses.codes import code_uniform as code_uniform
from codebind_jax.losses.codes import commitment as commitment
from codebind_jax.losses.contrastive import info_nce as info_nce
from codebind_jax.losses.disentangle import decomposition as decomposition
from codebind_jax.losses.disentangle import specific_uniform as specific_uniform
from codebind_jax.losses.reconstruction import reconstruction as reconstruction
from codebind_jax.losses.reconstruction import resize_target as resize_target

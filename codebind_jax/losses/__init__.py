"""Losses: pure functions of arrays, float32 inside whatever the compute type."""

from codebind_jax.losses.balance import BalanceState as BalanceState
from codebind_jax.losses.balance import balance_init as balance_init
from codebind_jax.losses.balance import balance_update as balance_update
from codebind_jax.losses.centroid import centroid_info_nce as centroid_info_nce
from codebind_jax.losses.centroid import directed_info_nce as directed_info_nce
from codebind_jax.losses.centroid import fixed_anchor_info_nce as fixed_anchor_info_nce
from codebind_jax.losses.code_contrast import code_contrast as code_contrast
from codebind_jax.losses.code_contrast import code_contrast_segments as code_contrast_segments
from codebind_jax.losses.codes import code_matching as code_matching
from codebind_jax.losses.codes import code_uniform as code_uniform
from codebind_jax.losses.codes import commitment as commitment
from codebind_jax.losses.contrastive import info_nce as info_nce
from codebind_jax.losses.cpc import cpc as cpc
from codebind_jax.losses.cpc import cross_cpc as cross_cpc
from codebind_jax.losses.disentangle import decomposition as decomposition
from codebind_jax.losses.disentangle import decorrelation as decorrelation
from codebind_jax.losses.disentangle import specific_uniform as specific_uniform
from codebind_jax.losses.mutual_information import club_estimate as club_estimate
from codebind_jax.losses.mutual_information import club_likelihood as club_likelihood
from codebind_jax.losses.reconstruction import reconstruction as reconstruction
from codebind_jax.losses.reconstruction import resize_target as resize_target

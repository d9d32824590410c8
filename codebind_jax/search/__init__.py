"""Nearest neighbours by cosine: ids and vectors or codes in, ids and scores out.

`Index` holds vectors, `CodeIndex` packed codes and what a `Codec` says of them. Both search with faiss where it is
installed (`pip install codebind_jax[search]`), else with numpy, and find the same; of equal items those that were added
first.
"""

from codebind_jax.search.codec import Codec as Codec
from codebind_jax.search.codes import CodeIndex as CodeIndex
from codebind_jax.search.scan import byte_table as byte_table
from codebind_jax.search.vectors import Index as Index

"""How an update travels: one compressor a file, and the menu.

=========  ============================  ==================  ======================
name       bits a parameter              error               choose it
=========  ============================  ==================  ======================
dense      32 or 16                      none, or rounding   to debug, or to compare
topk       ``H(d) + 16 d or 32 d``       drops small values  when sizes must survive
ternary    ``H(d) + d``                  and makes equal     by default
=========  ============================  ==================  ======================

with ``d`` the density and ``H`` the binary entropy. The last two are biased: wrap them
in :class:`ErrorFeedback`, which carries what was lost into the next round.
"""

from fedpeft.compression.dense import Dense
from fedpeft.compression.error_feedback import ErrorFeedback
from fedpeft.compression.ternary import Ternary
from fedpeft.compression.topk import TopK
from fedpeft.interfaces import Compressor

COMPRESSORS: dict[str, type[Compressor]] = {
    "dense": Dense,
    "topk": TopK,
    "ternary": Ternary,
}

__all__ = ["COMPRESSORS", "Dense", "ErrorFeedback", "Ternary", "TopK"]

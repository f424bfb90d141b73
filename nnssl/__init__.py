"""nnssl: semi-supervised and few-shot medical image segmentation on top of nnU-Net v2."""

from nnssl._version import __version__
from nnssl.guard import refuse_other_nnssl

__all__ = ["__version__"]

refuse_other_nnssl()

"""nnssl: semi-supervised and few-shot medical image segmentation on top of nnU-Net v2."""

from nnssl.guard import refuse_other_nnssl

__version__ = "0.1.0"

refuse_other_nnssl()

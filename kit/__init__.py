"""palign: long-chain reasoning distillation via adaptive prefix alignment, on one card (arXiv 2601.10064)."""

__version__ = "0.1.0"

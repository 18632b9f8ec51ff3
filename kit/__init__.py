"""palign: long-chain reasoning distillation via adaptive prefix alignment (arXiv 2601.10064)."""

import os
from typing import Any

Json = dict[str, Any]  # an object of JSON: a manifest, a row of a file, what --json prints

__version__ = "0.2.0"

# A waiting OpenMP thread spins, by default for so long that two runs on one machine slow each
# other not twice but 5 to 20 times. libgomp reads this when it is loaded, so it must be set before
# torch or llama.cpp is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

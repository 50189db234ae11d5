"""Names in a prepared directory; apart, so that who packs need not wait for torch."""

from __future__ import annotations

FORMAT, FORMAT_VERSION = "fsdfm-data", 1
SPLITS = ("train", "validation")

"""Decoding with other models or stored references: EFT, RTD. A wing."""

STORE_FILE = "store.json"  # marks a folder as a reference store

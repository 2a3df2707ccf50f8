"""Decoding with other models or stored references: EFT, RTD. A wing."""

"""Conversion constants: inside the library everything is seconds, bytes and tokens."""

MS_PER_S = 1000.0
US_PER_S = 1e6
BYTES_PER_GIB = 1024**3
BYTES_PER_MIB = 1024**2
S_PER_HOUR = 3600.0

"""Files that are wrong in every way that files are, made from right ones; what reads them must say so in a line."""

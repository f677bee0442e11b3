"""PVD: one radiance field into another of any form."""

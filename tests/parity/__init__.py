"""Parity with the oracles: arrays of the authors' own code, one adapter file a slug."""

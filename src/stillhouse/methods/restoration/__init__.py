"""Methods for networks that restore images."""

"""Methods for scenes: radiance fields."""

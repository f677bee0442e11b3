"""Methods of dense prediction: a class a pixel."""

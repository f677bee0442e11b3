"""Methods whose product is a small set of images; what they share is in `stillhouse.synthetic`."""

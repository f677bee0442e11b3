"""What methods of masked pre-training share: the masked autoencoder that is their teacher and baseline, and the probes
by which encoders are judged."""

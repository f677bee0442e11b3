"""Reports that stand alone: one HTML file of a run (`run_report`) or of a comparison (`comparison`), readable without a
network."""

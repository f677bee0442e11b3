"""Figures of networks: quality, cost, statistics over seeds, and what each figure means."""

"""Synthetic sets: a few images that train a network almost as well as a whole data set. The product, and the parts that
methods which make it share.

`config` (what their recipes share), `real` (real images by class), `initial` (how images begin), `synthesis` (images
being learned, with their draws and the outer loop), `descent` (images recovered from a network), `pools` (expert
trajectories), `relabel` (soft labels by view), `product`, `exchange` (files for others, and sets as data of other
recipes), `training` (networks trained on a set), `scores` (DD-Ranking).
"""

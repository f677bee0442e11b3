"""Data formats, a file each, named after the scheme of `data.name`; what a file holds: `data.format.Format`."""

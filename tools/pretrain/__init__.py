"""Trains the bundled moving-digits pipeline from the raw scans: `python -m pretrain --out FOLDER`."""

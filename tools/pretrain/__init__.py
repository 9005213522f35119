"""Trains the bundled models from the raw scans: `PYTHONPATH=tools python -m pretrain moving-digits --out FOLDER` in a clone. No part of the wheel."""

"""What knows nothing of models or media: atomic files, locks, sizes, intervals, progress, the version. It imports nothing of the package."""

"""A run: roles and optimisers, the iteration, batches, checkpoints, log, health, probes and the export at the end. It may import `export`, `recipes`,
`metrics`, `models`, `rewards` and the rooms below these.
"""

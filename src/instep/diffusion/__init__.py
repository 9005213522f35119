"""Pure maths on tensors: paths, predictions, levels, transitions, sampling, rollouts, advantages, guidance. It may import `core`, and sees no module,
configuration, device or rank.
"""

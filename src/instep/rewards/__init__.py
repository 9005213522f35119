"""Rewards: one file a reward, each gives `score(media, prompts) -> [B]`, higher is better."""
